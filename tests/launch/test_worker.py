"""launch/worker.sh as ssh runs it, with a home of its own and a `jvlm` that the test wrote."""

import os
import shutil
import subprocess
import time

import pytest

from tests.support import ROOT

WAIT = 'until [ -e "$HOME/go" ]; do sleep 0.02; done'


class Worker:
    """A home folder with unpacked code and an installed jvlm."""

    def __init__(self, home, jvlm):
        launch = home / "jvlm-code" / "launch"
        programs = home / "jvlm-code" / ".venv" / "bin"
        launch.mkdir(parents=True)
        programs.mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "worker.sh", launch)
        (programs / "jvlm").write_text(f"#!/bin/bash\n{jvlm}\n")
        (programs / "jvlm").chmod(0o755)
        self.home = home

    def __call__(self, *words):
        command = ["bash", "jvlm-code/launch/worker.sh", *words]
        environment = {**os.environ, "HOME": str(self.home)}
        done = subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self):
        words = dict(word.split("=") for word in self("status").split()[1:])
        return words["state"], words["code"]

    def wait(self, state):
        self._until(lambda: self.state()[0], state)

    def wait_for_log(self, text):
        """Until the job has written exactly this."""
        self._until(lambda: self("tail", "99"), text)

    def let_go(self):
        """What jobs that run `WAIT` wait for."""
        (self.home / "go").touch()

    def _until(self, look, wanted):
        deadline = time.monotonic() + 10
        while (found := look()) != wanted:
            assert time.monotonic() < deadline, f"{found!r}, not {wanted!r}"
            time.sleep(0.05)


@pytest.fixture
def worker(tmp_path):
    made = []

    def make(jvlm):
        made.append(Worker(tmp_path, jvlm))
        return made[-1]

    yield make
    for one in made:
        one("stop", "0")


def test_a_job_outlives_the_connection_and_leaves_its_exit_status(worker):
    run = worker(f'echo "$@"; echo oops >&2; {WAIT}; exit 7')
    assert run.state() == ("idle", "-")
    run("start", "jvlm", "train", "my config", "--steps", "3")  # returns at once, as ssh must
    assert run.state()[0] == "running"
    run.let_go()
    run.wait("exited")
    assert run.state() == ("exited", "7")
    assert run("tail", "9") == "train my config --steps 3\noops\n"


def test_the_log_is_read_on_from_where_the_last_look_ended(worker):
    run = worker(f"echo one; {WAIT}; echo two")
    run("start", "jvlm")
    run.wait_for_log("one\n")
    assert run("log", "0") == "JVLM-LOG 4\none\n"
    run.let_go()
    run.wait("exited")
    assert run("log", "4") == "JVLM-LOG 8\ntwo\n"
    assert run("log", "8") == "JVLM-LOG 8\n"
    assert run("log", "900") == "JVLM-LOG 8\none\ntwo\n"  # a log that began anew


@pytest.mark.slow
def test_stop_lets_the_job_save_and_a_new_start_ends_the_old_job(worker):
    run = worker('trap "echo saved; exit 75" TERM; echo up; while true; do sleep 0.05; done')
    run("start", "jvlm")
    run.wait_for_log("up\n")  # its trap is set
    run("stop", "5")
    assert run("tail", "1") == "saved\n"
    assert run.state() == ("exited", "75")
    run("start", "jvlm")
    first = (run.home / "jvlm-job" / "pid").read_text()
    run("start", "jvlm")
    assert (run.home / "jvlm-job" / "pid").read_text() != first
    assert not os.path.exists(f"/proc/{first.strip()}")
    assert run.state()[0] == "running"


def test_a_job_killed_with_all_its_processes_is_lost_not_running(worker):
    run = worker("sleep 60")
    run("start", "jvlm")
    os.killpg(int((run.home / "jvlm-job" / "pid").read_text()), 9)
    run.wait("lost")
