"""launch/gke.py against a kubectl that the test wrote, and launch/slurm.sh against an srun."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.launch.test_tpu import CONFIG, repository  # noqa: F401  (a fixture)
from tests.support import ROOT

RUN = ("--name", "mimo", "--topology", "v5p:4x4x8", "--output", "gs://b/runs")

KUBECTL = """
calls = json.loads(CALLS.read_text())
CALLS.write_text(json.dumps([*calls, [NAME, *sys.argv[1:]]]))
looks = sum(call[1:3] == ["get", "jobset"] for call in calls)
if sys.argv[1:3] == ["get", "jobset"]:
    ended = [{"type": "END", "status": "True"}] if looks >= 3 else []
    print(json.dumps({"status": {"restarts": int(looks >= 2), "conditions": ended}}))
if sys.argv[1] == "logs" and not sys.argv[2].startswith("--"):
    if sys.argv[2].endswith("-5"):
        sys.exit("Error from server (NotFound): pods not found")
    print(f"log of {sys.argv[2]}\\nValueError: row 7 has no image")
elif sys.argv[1] == "logs":
    if looks == 1:
        sys.exit("Error from server (BadRequest): container jvlm in pod mimo is waiting to start: PodInitializing")
    print("step 1" if looks == 2 else "step 1\\nstep 2")
if sys.argv[1:3] == ["get", "pods"]:
    pods, kinds = [], {4: "container", 3: "container", 5: "initContainer", 6: "container"}
    for second, (worker, kind) in zip((9, 7, 8, 6), kinds.items(), strict=True):
        ended = {"exitCode": CODE if worker < 6 else 0, "finishedAt": f"2026-01-01T00:00:0{second}Z"}
        container = {"name": "fetch" if kind[0] == "i" else "jvlm", "state": {"terminated": ended}}
        pods.append({"metadata": {"name": f"mimo-slice-1-{worker}"}, "status": {f"{kind}Statuses": [container]}})
    print(json.dumps({"items": pods}))
"""


@pytest.fixture
def cluster(tmp_path, repository):  # noqa: F811
    """Launch on a cluster whose JobSet is restarted once and then ends as told."""
    calls = tmp_path / "calls.json"
    (tmp_path / "bin").mkdir()

    def launch(*arguments, end="Completed", code=0):
        calls.write_text("[]")
        for name in ("kubectl", "gcloud", "xpk"):
            program = tmp_path / "bin" / name
            head = f"#!{sys.executable} -ES\nimport json, pathlib, sys\nCALLS = pathlib.Path({str(calls)!r})\n"
            program.write_text(f"{head}NAME, CODE = {name!r}, {code}\n{KUBECTL.replace('END', end)}")
            program.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = [sys.executable, str(repository / "launch" / "gke.py"), CONFIG, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done, json.loads(calls.read_text())

    return launch


def test_a_jobset_is_submitted_followed_through_a_restart_and_deleted(cluster, tmp_path):
    done, calls = cluster(*RUN, "--slices", "2", "--poll", "0.01", "--", "--steps", "9")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "step 1\nstep 1\nstep 2\n"  # the second run's log from its beginning
    assert "started again, 1 of 100 times" in done.stderr
    assert calls[0][:3] == ["gcloud", "storage", "cp"]
    assert calls[-1] == ["kubectl", "delete", "jobset", "mimo", "--ignore-not-found", "--namespace=default"]
    manifest = json.loads((tmp_path / "runs" / "launch" / "mimo" / "jobset.json").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    assert (manifest["kind"], manifest["apiVersion"], job["replicas"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2", 2)
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (32, 32, 0)  # 128 chips, four a machine
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["command"][-1].endswith("--steps 9")
    assert calls[0][-1] in pod["initContainers"][0]["command"][-1]


def test_a_jobset_that_failed_names_the_pods_in_order_and_keeps_the_ends_of_their_logs(cluster, tmp_path):
    done, calls = cluster(*RUN, "--poll", "0.01", end="Failed", code=137)
    assert done.returncode == 1
    named = [line.partition("FAILED ")[2].split(",")[0] for line in done.stderr.splitlines() if "FAILED" in line]
    assert named == ["mimo-slice-1-3", "mimo-slice-1-5", "mimo-slice-1-4"]
    assert "mimo-slice-1-5, container fetch, exit status 137" in done.stderr
    assert "no log of mimo-slice-1-5" in done.stderr
    kept = (tmp_path / "runs" / "launch" / "mimo" / "failed.log").read_text()
    assert kept.index("log of mimo-slice-1-3") < kept.index("log of mimo-slice-1-4")
    assert "row 7 has no image" in done.stdout
    assert ["kubectl", "logs", "mimo-slice-1-5", "--container=fetch", "--tail=200", "--namespace=default"] in calls
    assert calls[-1][1] == "delete"


def test_xpk_gets_the_code_and_the_command(cluster, tmp_path):
    done, calls = cluster(*RUN, "--xpk", "--cluster", "c", "--zone", "us-east5-a", "--spot")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call[:4] == ["xpk", "workload", "create", "--workload=mimo"]
    assert {"--tpu-type=v5p-4x4x8", "--cluster=c", "--zone=us-east5-a", "--spot", "--num-slices=1"} < set(call)
    folder = next(word.partition("=")[2] for word in call if word.startswith("--script-dir="))
    assert (tmp_path / folder / "configs" / "mimo_vl" / "easy_vqa.py").is_file()


def test_a_dry_run_prints_commands_and_the_manifest(cluster):
    done, calls = cluster(*RUN, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert calls == []
    commands, _, manifest = done.stdout.partition("# ")
    kubectl = [shlex.split(line)[1] for line in commands.splitlines() if line.startswith("kubectl")]
    assert kubectl == ["apply", "logs", "get", "get", "delete"]
    assert json.loads(manifest.partition("\n")[2])["kind"] == "JobSet"


def test_slurm_runs_one_process_a_machine_with_all_its_gpus(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\necho "$JAX_LOCAL_DEVICE_IDS|$*"\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "8"}
    script = ["bash", str(ROOT / "launch" / "slurm.sh"), CONFIG, "--steps", "9"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    devices, _, command = done.stdout.strip().partition("|")
    assert devices == "0,1,2,3,4,5,6,7"
    assert command == f"--kill-on-bad-exit=1 .venv/bin/jvlm train {CONFIG} --steps 9 --distributed true"
