"""The GPU pass: what is cut off or fails is said and loses nothing, and profiles are split by the model's parts."""

import subprocess
import sys

import pytest

from tests.support import ROOT
from tools import gpu_pass
from tools.gpu import device_trace

SLEEP = ("timeit", "-n", "1", "-r", "1", "import time; print('began', flush=True); time.sleep(60)")


@pytest.mark.slow
def test_each_part_leaves_its_output_and_how_it_ended(tmp_path, monkeypatch, capsys):
    parts = [
        gpu_pass.Part("good", ("platform",), 60),
        gpu_pass.Part("bad", ("timeit", "--no-such-option"), 60),
        gpu_pass.Part("slow", SLEEP, 5),
    ]
    monkeypatch.setattr(gpu_pass, "parts_of", lambda output, small: parts)
    monkeypatch.setattr(sys, "argv", ["gpu_pass.py", "--output", str(tmp_path)])
    assert gpu_pass.main() == 1
    summary = (tmp_path / "README.md").read_text()
    endings = [
        line.split("|")[3].strip() for line in summary.splitlines() if line.startswith(("| good", "| bad", "| slow"))
    ]
    assert endings == ["done", "failed, status 2", "cut off after 5 s"]
    assert (tmp_path / "good.md").read_text().strip()
    assert "began" in (tmp_path / "slow.md").read_text()
    assert "no-such-option" in capsys.readouterr().out


def test_a_part_without_time_left_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pass, "parts_of", lambda output, small: [gpu_pass.Part("late", SLEEP, 60)])
    monkeypatch.setattr(sys, "argv", ["gpu_pass.py", "--output", str(tmp_path), "--minutes", "0"])
    assert gpu_pass.main() == 1
    assert "left out: no time" in (tmp_path / "README.md").read_text()


def test_the_parts_name_programs_that_take_their_options(tmp_path):
    for small in (False, True):
        for part in gpu_pass.parts_of(tmp_path, small):
            path = ROOT.joinpath(*part.command[0].split(".")).with_suffix(".py")
            assert path.is_file(), part
    unknown = [sys.executable, "tools/gpu_pass.py", "--parts", "nothing", "--output", str(tmp_path)]
    result = subprocess.run(unknown, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no part nothing" in result.stderr


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/jvp(encoder)/while/body/closed_call/attention/dot_general", "encoder/attention"),
        ("jit(step)/transpose(jvp(decoder))/while/body/rematted/mlp/mul", "decoder/mlp"),
        (
            "jit(step)/decoder/while/body/attention/segment_attention_mosaic_gpu_forward/pallas_call",
            "decoder/segment_attention",
        ),
        ("jit(step)/update/mul", "update"),
        ("jit(step)/convert_element_type", "rest"),
    ],
)
def test_an_instruction_belongs_to_the_part_that_its_scope_names(scope, part):
    assert device_trace.part_of_scope(scope) == part
    line = f'  %fusion.3 = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%y, metadata={{op_name="{scope}"}}'
    assert device_trace.parts_of_instructions(line) == {"fusion.3": part}
