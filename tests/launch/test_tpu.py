"""The launcher as a user runs it, against a gcloud that the test wrote."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, hearing_ctrl_c

LIVING = "state=running code=- time=-"
DONE = "state=exited code=0 time=100"
CONFIG = "mimo_vl/easy_vqa"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with the launcher and one config, all committed."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "configs" / "mimo_vl").mkdir(parents=True)
    (folder / "configs" / "mimo_vl" / "easy_vqa.py").write_text("rate = 1\n")
    (folder / ".gitignore").write_text("__pycache__/\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    return folder


class World:
    """A folder with a scripted gcloud and the launcher's state, and the calls that were made."""

    def __init__(self, folder: Path, lives, repository: Path, refuse=(), why=""):
        self.repository = repository
        self.folder, self.file = folder, folder / "bin" / "world.json"
        self.file.parent.mkdir()
        program = self.file.with_name("gcloud")
        script = (Path(__file__).with_name("fake_gcloud.py")).read_text()
        program.write_text(f"#!{sys.executable} -ES\n{script}")
        program.chmod(0o755)
        world = {"alive": False, "life": -1, "lives": lives, "states": [], "status": [], "calls": []}
        self.file.write_text(json.dumps({**world, "refuse": [list(r) for r in refuse], "why": why}))
        self.environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def command(self, *arguments, verb="run"):
        return [sys.executable, str(self.repository / "launch" / "tpu.py"), verb, *arguments]

    def launch(self, *arguments, verb="run"):
        command = self.command(*arguments, verb=verb)
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )

    def read(self):
        return json.loads(self.file.read_text())

    @property
    def calls(self):
        """Verbs in order, ssh with the word for worker.sh; looks that repeat are left out."""
        names = []
        for call in self.read()["calls"]:
            command = next((a for a in call if a.startswith("--command=")), "")
            word = f" {command.split('worker.sh ')[1].split()[0]}" if "worker.sh " in command else ""
            names.append(call[3] + word)
        return [name for name in names if name not in ("describe", "ssh log", "ssh status")]


RUN = ("--name", "mimo", "--type", "v5p-128", "--zone", "us-east5-a", "--output", "gs://b/runs")
FAST = ("--poll", "0.02", "--retry_seconds", "0.01")
START = ["scp", "ssh", "ssh install", "ssh start"]


def test_a_run_is_created_shipped_started_followed_and_deleted(tmp_path, repository):
    lives = [
        {
            "states": ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
            "status": [[LIVING] * 2, [DONE] * 2],
        }
    ]
    world = World(tmp_path, lives, repository)
    done = world.launch(CONFIG, *RUN, *FAST, "--spot", "--slices", "2", "--", "--optimizer.learning_rate", "1e-4")
    assert done.returncode == 0, done.stderr
    assert world.calls == ["create", *START, "delete"]
    assert done.stdout == "step 1 loss 2.5\n"
    assert "128 chips" in done.stderr
    assert "nothing of this run is billed" in done.stderr
    create = next(call for call in world.read()["calls"] if call[3] == "create")
    assert create[4:] == [
        "mimo",
        "--zone=us-east5-a",
        "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-count=2",
        "--node-prefix=mimo",
        "--spot",
        "--quiet",
    ]
    start = next(call for call in world.read()["calls"] if any("worker.sh start" in a for a in call))
    assert "--worker=all" in start
    assert "--node=all" in start
    trained = shlex.split(start[-1].partition("=")[2])
    assert trained[:5] == ["bash", "jvlm-code/launch/worker.sh", "start", "jvlm", "train"]
    assert trained[-2:] == ["--optimizer.learning_rate", "1e-4"]
    assert trained[trained.index("--output_root") + 1] == "gs://b/runs"


def test_preempted_twice_once_while_training_and_once_while_waiting(tmp_path, repository):
    lives = [
        {"states": ["ACTIVE"], "status": [[LIVING], "gone"]},
        {"states": ["PROVISIONING", "SUSPENDED"]},
        {"states": ["WAITING_FOR_RESOURCES", "ACTIVE"], "status": [[DONE]]},
    ]
    world = World(tmp_path, lives, repository)
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 0, done.stderr
    assert world.calls == ["create", *START, "delete", "create", "delete", "create", *START, "delete"]
    assert "2 of 100 times" in done.stderr


def test_a_job_that_was_told_to_stop_goes_on_where_the_machines_still_are(tmp_path, repository):
    saved = "state=exited code=75 time=9"
    lives = [
        {"states": ["ACTIVE"], "status": [[LIVING] * 2, [LIVING, saved], ["state=lost code=- time=-", saved], [DONE]]}
    ]
    world = World(tmp_path, lives, repository)
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 0, done.stderr
    assert world.calls == ["create", *START, *START, "delete"]
    assert "told to stop, and saved; going on, 1 of 100 times" in done.stderr


def test_machines_that_are_always_taken_away_end_the_run_with_nothing_left(tmp_path, repository):
    world = World(tmp_path, [{"states": ["SUSPENDED"]}] * 3, repository)
    done = world.launch(CONFIG, *RUN, *FAST, "--max_preemptions", "2")
    assert done.returncode == 1
    assert "it went on 2 times already; deleted" in done.stderr
    assert not world.read()["alive"]


def test_one_worker_that_dies_is_named_with_its_log_and_the_machines_are_deleted(tmp_path, repository):
    died = [LIVING, "state=exited code=1 time=50", "state=exited code=134 time=60", "state=lost code=- time=-"]
    world = World(tmp_path, [{"states": ["ACTIVE"], "status": [[LIVING] * 4, died]}], repository)
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 1
    assert "launch: w-1: exit status 1 (first of 3)" in done.stderr
    assert "ValueError: row 7 has no image" in done.stdout
    assert world.calls[-3:] == ["ssh tail", "ssh stop", "delete"]
    assert "row 7" in (tmp_path / "runs" / "launch" / "mimo" / "failed.log").read_text()


def test_a_crashed_job_is_started_again_on_the_same_machines_as_often_as_asked(tmp_path, repository):
    lives = [{"states": ["ACTIVE"], "status": [["state=exited code=139 time=5"], [DONE]]}]
    world = World(tmp_path, lives, repository)
    done = world.launch(CONFIG, *RUN, *FAST, "--restart_crashed", "1")
    assert done.returncode == 0, done.stderr
    assert world.calls == ["create", *START, "ssh tail", "ssh stop", *START, "delete"]


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (
            "Quota limit 'TPUV5PPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a.",
            "README: Quota",
        ),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "lacks a role"),
        ("There is no active account: run `gcloud auth login`", "gcloud auth login"),
    ],
)
def test_a_refused_creation_is_not_repeated_and_says_what_to_do(tmp_path, message, advice, repository):
    world = World(tmp_path, [{"states": ["ACTIVE"]}], repository, refuse=[("create", message)])
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 1
    assert message in done.stderr
    assert advice in done.stderr
    assert "no machine was left; nothing is billed" in done.stderr
    assert world.calls == ["create"]


def test_a_request_that_fails_in_the_queue_is_deleted_and_its_reason_printed(tmp_path, repository):
    world = World(
        tmp_path, [{"states": ["WAITING_FOR_RESOURCES", "FAILED"]}], repository, why="no capacity until the deadline"
    )
    done = world.launch(CONFIG, *RUN, *FAST, "--valid_until", "6h")
    assert done.returncode == 1
    assert "no capacity until the deadline" in done.stderr
    assert world.calls == ["create", "delete"]
    assert "--valid-until-duration=6h" in world.read()["calls"][1]


def test_transient_failures_are_tried_again(tmp_path, repository):
    refuse = [
        ("create", "UNAVAILABLE: The service is currently unavailable."),
        ("scp", "[/usr/bin/scp] exited with return code [255]."),
        ("ssh status", "ssh: connect to host 10.0.0.2 port 22: Connection refused"),
    ]
    world = World(tmp_path, [{"states": ["ACTIVE"], "status": [[DONE]]}], repository, refuse=refuse)
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 0, done.stderr
    assert world.calls == ["create", "create", "scp", *START, "delete"]


def test_a_broken_installation_stops_and_says_what_is_billed_and_how_to_end_it(tmp_path, repository):
    world = World(
        tmp_path, [{"states": ["ACTIVE"]}], repository, refuse=[("ssh install", "No matching distribution for jax==9")]
    )
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 1
    assert "No matching distribution" in done.stderr
    delete = "gcloud compute tpus queued-resources delete mimo --zone=us-east5-a --force --quiet"
    assert f"64 chips (v5p-128 x 1) are billed until: {delete}" in done.stderr
    assert world.read()["alive"]


def interrupt(world, until, *arguments):
    """Start the launcher, press Ctrl-C once a line has been printed, and return its status and error output."""
    process = subprocess.Popen(
        hearing_ctrl_c(*world.command(CONFIG, *RUN, *FAST, *arguments)),
        cwd=world.folder,
        env=world.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a group of its own, as a terminal gives it: Ctrl-C reaches the gcloud that is running too, which could else
        # outlive the launcher and write over what comes after
        start_new_session=True,
    )
    try:
        seen = ""
        while until not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    return process.returncode, seen + rest


def test_ctrl_c_while_waiting_deletes_the_request(tmp_path, repository):
    world = World(tmp_path, [{"states": ["WAITING_FOR_RESOURCES"]}], repository)
    status, said = interrupt(world, "WAITING_FOR_RESOURCES")
    assert status == 130
    assert "deleting the request" in said
    assert world.calls == ["create", "delete"]


def test_ctrl_c_while_training_leaves_the_job_and_follow_takes_it_up_to_its_end(tmp_path, repository):
    world = World(tmp_path, [{"states": ["ACTIVE"], "status": [[LIVING]]}], repository)
    status, said = interrupt(world, "Ctrl-C leaves the job running")
    assert status == 130
    assert "python launch/tpu.py follow mimo" in said
    assert "64 chips (v5p-128 x 1) are billed until: gcloud" in said
    assert world.read()["alive"]
    values = world.read()
    world.file.write_text(json.dumps({**values, "status": [[LIVING], [DONE]], "calls": []}))
    done = world.launch("mimo", *FAST, verb="follow")
    assert done.returncode == 0, done.stderr
    assert world.calls == ["delete"]


def test_status_and_delete(tmp_path, repository):
    world = World(tmp_path, [{"states": ["ACTIVE"], "status": [[DONE]]}], repository)
    assert world.launch(CONFIG, *RUN, *FAST, "--keep").returncode == 0
    assert "JVLM-STATUS worker=w-0 state=exited code=0" in world.launch("mimo", verb="status").stdout
    assert world.launch("mimo", verb="delete").returncode == 0
    assert "nothing is billed" in world.launch("mimo", verb="status").stdout


def test_a_name_that_is_taken_is_refused(tmp_path, repository):
    world = World(tmp_path, [{"states": ["ACTIVE"], "status": [[DONE]]}], repository)
    world.launch(CONFIG, *RUN, *FAST, "--keep")
    done = world.launch(CONFIG, *RUN, *FAST)
    assert done.returncode == 2
    assert "mimo exists already and is ACTIVE" in done.stderr


def test_a_dry_run_prints_the_commands_and_calls_nothing(tmp_path, repository):
    world = World(tmp_path, [], repository)
    done = world.launch(CONFIG, *RUN, "--dry-run", "--reserved", "--", "--steps", "10")
    assert done.returncode == 0, done.stderr
    assert not world.read()["calls"]
    assert not (tmp_path / "runs").exists()
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    verbs = [command[4] for command in commands if command[0] == "gcloud"]
    assert verbs == ["create", "describe", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert "--reserved" in commands[1]
    assert commands[6][-1].endswith("--steps 10")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("--output", "/home/me/runs"), "is on the TPU's own disk"),
        (("--type", "h100-8"), "is none of v4-N"),
        (("--type", "tpu7x-64"), "launch/gke.py"),
        (("--name", "Mimo_4"), "small letters"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_created(tmp_path, change, complaint, repository):
    world = World(tmp_path, [], repository)
    done = world.launch(CONFIG, *RUN, *change)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not world.read()["calls"]


def test_only_committed_code_is_shipped_unless_asked(tmp_path, repository):
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    (copy / "configs" / "mimo_vl" / "easy_vqa.py").write_text("rate = 2\n")
    world = World(tmp_path, [{"states": ["ACTIVE"], "status": [[DONE]]}], copy)
    refused = world.launch(CONFIG, *RUN, *FAST)
    assert refused.returncode == 2
    assert "1 files differ from the last commit (configs/mimo_vl/easy_vqa.py)" in refused.stderr
    shipped = world.launch(CONFIG, *RUN, *FAST, "--dirty")
    assert shipped.returncode == 0, shipped.stderr
    (archive,) = (tmp_path / "runs" / "launch" / "mimo").glob("*.tar.gz")
    name = "configs/mimo_vl/easy_vqa.py"
    packed = subprocess.run(["tar", "-xzOf", archive, name], capture_output=True, text=True, check=True)
    assert packed.stdout == "rate = 2\n"
    missing = world.launch("mimo_vl/nothing", *RUN, "--dirty")
    assert missing.returncode == 2
    assert "it has configs/mimo_vl/easy_vqa.py" in missing.stderr
