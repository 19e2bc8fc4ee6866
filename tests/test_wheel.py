"""What a user gets from the wheel: every command and the shipped configs, without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel installed in it, which was built from the source distribution, and nothing else."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("jvlm", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    for command in (
        ["-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')"],
        [
            *pip,
            "wheel",
            *offline,
            "--no-build-isolation",
            "-w",
            "dist",
            "--find-links",
            "dist",
            "--no-binary",
            "jvlm",
            "jvlm",
        ],
        [*pip, "install", *offline, "--target", target, "--find-links", "dist", "--only-binary", "jvlm", "jvlm"],
    ):
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return target


@pytest.fixture
def jvlm(installed, tmp_path):
    """Run the installed command in an empty folder; -S leaves out the editable install of the environment."""

    def run(*arguments: object) -> str:
        beside = [sysconfig.get_paths()["purelib"], str(Path(sys.prefix) / "tpu-compiler")]
        done = subprocess.run(
            [sys.executable, "-S", str(installed / "bin" / "jvlm"), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *beside])},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert str(ROOT) not in done.stdout + done.stderr
        return done.stdout

    return run


def test_a_shipped_config_can_be_trained_by_name(jvlm):
    assert "--data.train" in jvlm("train", "mimo_vl/stage4", "--help")
    assert "mimo_vl/stage4" in jvlm("configs")


def test_a_step_is_planned_and_a_checkpoint_converted(jvlm, tiny, tmp_path):
    assert "**fits**" in jvlm("plan", "mimo_vl/easy_vqa", "--what", "decode", "--topology", "v5e:2x2")
    assert f"wrote {tmp_path / 'new'}" in jvlm("convert", tiny.folder, tmp_path / "new", "--dtype", "bfloat16")
    assert (tmp_path / "new" / "config.json").is_file()


def test_the_demo_s_data_and_tokenizer_are_shipped(jvlm, installed):
    shipped = installed / "jvlm" / "_configs" / "mimo_vl"
    text = jvlm("data", "check", shipped / "easy_vqa_data" / "where.arrayrecord", "--config", "mimo_vl/easy_vqa")
    assert "can be used" in text
    files = {str(path.relative_to(installed / "jvlm" / "_configs")) for path in shipped.parent.rglob("*")}
    wanted = {str(path.relative_to(ROOT / "configs")) for path in Path(ROOT / "configs").rglob("*")}
    assert {name for name in wanted if "__pycache__" not in name} == {n for n in files if "__pycache__" not in n}


def test_the_chat_page_is_shipped(installed):
    names = {path.name for path in (ROOT / "jvlm" / "server" / "page").iterdir() if path.name != "__pycache__"}
    assert {path.name for path in (installed / "jvlm" / "server" / "page").iterdir()} - {"__pycache__"} == names
