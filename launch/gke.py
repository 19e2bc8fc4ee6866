"""Bring a config to TPUs of Google Kubernetes Engine: a JobSet, or xpk where the cluster was made by xpk.

    python launch/gke.py CONFIG --name mimo-4 --topology v5p:4x4x4 --output gs://bucket/runs --slices 2 [--dry-run] \
        [--xpk --cluster mine --zone us-east5-a] -- --data.train gs://bucket/examples.jsonl

The cluster and its TPU node pools exist already (README.md). JobSet starts all workers again after a preemption.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tarfile
import time
from pathlib import Path

import source
import train
from cloud import Cloud, CommandError, Retry, log_with_time
from jobset import GkeSpec
from queued import STATE_FOLDER

# of failed containers: the first to end says why, the others that it was gone
LOGS_KEPT = 16


def main(argv: list[str] | None = None) -> int:
    """Submit, follow, delete; returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:cut])
    try:
        return _run(arguments, argv[cut + 1 :])
    except CommandError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, fields: list[str]) -> int:
    if arguments.xpk and not (arguments.cluster and arguments.zone):
        raise ValueError("--xpk needs --cluster and --zone")
    revision = source.commit(arguments.dirty)
    source.require(revision, arguments.config)
    names = "name topology output slices spot reservation restarts namespace service_account queue image".split()
    spec = GkeSpec(
        revision=revision,
        train=train.command(arguments.config, arguments.name, arguments.output, fields),
        **{name: getattr(arguments, name) for name in names},
    )
    folder = STATE_FOLDER / spec.name
    if arguments.dry_run:
        _print_commands(spec, arguments, folder)
        return 0
    cloud = Cloud(retry=Retry(seconds=arguments.retry_seconds), log=log_with_time)
    archive = source.archive(revision, folder)
    if arguments.xpk:
        code = folder / "code"
        with tarfile.open(archive) as packed:
            packed.extractall(code, filter="data")
        cloud.run(spec.xpk(arguments.cluster, arguments.zone, arguments.project, str(code)), retry=False)
        ending = spec.xpk_delete(arguments.cluster, arguments.zone, arguments.project)
        cloud.log(f"submitted; it holds its chips until it ends, or: {shlex.join(ending)}")
        return 0
    manifest = folder / "jobset.json"
    manifest.write_text(json.dumps(spec.manifest(), indent=2) + "\n")
    cloud.run(spec.upload(str(archive)))
    cloud.run(spec.apply(str(manifest)))
    cloud.log(f"submitted {spec.name}: {spec.slices} x {spec.machines} machines of {spec.topology}")
    try:
        return _follow(spec, cloud, arguments.poll, folder)
    except KeyboardInterrupt:
        cloud.log(f"the job goes on without you. Its chips are held until it ends, or: {shlex.join(spec.delete())}")
        return 130


def _follow(spec: GkeSpec, cloud: Cloud, poll: float, folder: Path) -> int:
    """Print worker 0's log until the JobSet has ended; then name failed pods, keep their logs, and delete it."""
    printed, restarts = 0, 0
    while True:
        status = cloud.json(spec.get(), expect="missing").get("status", {})
        ended = {c["type"] for c in status.get("conditions", []) if c.get("status") == "True"} & {"Completed", "Failed"}
        if status.get("restarts", 0) != restarts:
            restarts, printed = status["restarts"], 0
            cloud.log(f"all workers were started again, {restarts} of {spec.restarts} times")
        try:
            text = cloud.run(spec.logs(), retry=False)
        except CommandError as error:
            # no pod yet, or one that is still fetching the code
            cloud.log(f"no log yet: {error.output[-120:]}")
            text = ""
        if len(text) > printed:
            print(text[printed:], end="", flush=True)
            printed = len(text)
        if ended:
            break
        time.sleep(poll)
    _report(spec, cloud, folder)
    cloud.run(spec.delete())
    cloud.log("JobSet deleted. A node pool without autoscaling goes on being billed: gcloud container node-pools list")
    return 1 if "Failed" in ended else 0


def _report(spec: GkeSpec, cloud: Cloud, folder: Path) -> None:
    """Name the containers that failed, the first to end first, and keep the ends of their logs."""
    failed = []
    for pod in cloud.json(spec.pods()).get("items", []):
        status = pod.get("status", {})
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            ended = container.get("state", {}).get("terminated", {})
            if ended.get("exitCode", 0):
                failed.append(
                    (ended.get("finishedAt", ""), pod["metadata"]["name"], container["name"], ended["exitCode"])
                )
    tails = []
    for number, (when, pod, container, code) in enumerate(sorted(failed)):
        name = f"{pod}, container {container}, exit status {code} {when}".strip()
        cloud.log(f"FAILED {name}")
        if number >= LOGS_KEPT:
            continue
        try:
            tails.append(f"== {name}\n{cloud.run(spec.tail(pod, container))}")
        except CommandError as error:
            cloud.log(f"no log of {pod}: {error.output[-200:]}")
    if tails:
        (folder / "failed.log").write_text("\n".join(tails))
        print("\n".join(tails[0].splitlines()[-40:]), flush=True)
        cloud.log(f"the ends of {len(tails)} logs are in {folder / 'failed.log'}")


def _print_commands(spec: GkeSpec, arguments: argparse.Namespace, folder: Path) -> None:
    archive = folder / f"jvlm-{spec.revision[:12]}.tar.gz"
    steps = [["git", "archive", "--format=tar.gz", f"--output={archive}", spec.revision]]
    if arguments.xpk:
        where = (arguments.cluster, arguments.zone, arguments.project)
        steps += [
            ["mkdir", "-p", str(folder / "code")],
            ["tar", "-xzf", str(archive), "-C", str(folder / "code")],
            spec.xpk(*where, str(folder / "code")),
            spec.xpk_delete(*where),
        ]
    else:
        steps += [spec.upload(str(archive)), spec.apply(str(folder / "jobset.json")), spec.logs(), spec.get()]
        steps += [spec.pods(), spec.delete()]
    for command in steps:
        print(shlex.join(command))
    if not arguments.xpk:
        print(f"# {folder / 'jobset.json'}\n{json.dumps(spec.manifest(), indent=2)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of the commit with get_config(), or its name under configs/")
    parser.add_argument("--name", required=True, help="of the JobSet and of the run")
    parser.add_argument("--topology", required=True, help="of a slice: v5p:4x4x4, v6e:16x16, v5e:4x8")
    parser.add_argument("--output", required=True, help="gs:// folder; the run is its sub-folder NAME")
    parser.add_argument("--slices", type=int, default=1)
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="on node pools of spot machines")
    tier.add_argument("--reservation", help="on node pools of this reservation")
    parser.add_argument("--restarts", type=int, default=100, help="after failures and preemptions")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service_account", default="default", help="Kubernetes account that may use the bucket")
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--image", default=GkeSpec.image, help="container with Python 3.11 to 3.13 and bash")
    parser.add_argument("--xpk", action="store_true", help="submit with xpk")
    parser.add_argument("--cluster", help="xpk's cluster")
    parser.add_argument("--zone", help="of xpk's cluster")
    parser.add_argument("--project", help="of xpk's cluster")
    parser.add_argument("--dirty", action="store_true", help="ship uncommitted changes too")
    parser.add_argument("--poll", type=float, default=30.0, help="seconds between polls")
    parser.add_argument("--retry_seconds", type=float, default=5.0, help="first wait after a transient failure")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the manifest, run none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
