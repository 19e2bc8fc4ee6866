"""`python tools/convert.py`, the door of `jvlm convert`, as a user types it."""

import subprocess
import sys

import pytest

from jvlm.cli import main
from tests.support import ROOT


def run(*arguments):
    command = [sys.executable, "tools/convert.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_tool_converts_and_says_where(tiny, tmp_path):
    options = "--dtype bfloat16 --layout transformers --shard-size 100KB".split()
    result = run(tiny.folder, tmp_path / "new", *options)
    assert result.returncode == 0, result.stderr
    assert f"wrote {tmp_path / 'new'}" in result.stdout
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["SOURCE", "SOURCE"], "is not an empty folder"),
        (["absent", "NEW"], "absent is not a folder"),
        (["SOURCE", "NEW", "--layout", "old"], "unknown layout 'old'; known: released, transformers"),
        (["SOURCE", "NEW", "--shard-size", "big"], "'big' is not a size"),
        (["SOURCE", "NEW", "--dtype", "int4"], "--dtype int4: it takes keep or float32 or bfloat16 or float16"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(tiny, tmp_path, arguments, says, capsys):
    places = {"SOURCE": tiny.folder, "NEW": tmp_path / "new"}
    assert main(["convert", *(str(places.get(a, a)) for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
