"""Bring a config to Cloud TPUs, with one command. launch/README.md is the runbook.

    python launch/tpu.py run CONFIG --name mimo-4 --type v5p-128 --zone us-east5-a --output gs://bucket/runs --spot \
        -- --data.train gs://bucket/examples.jsonl
    python launch/tpu.py follow mimo-4      # again after Ctrl-C or a closed laptop
    python launch/tpu.py status mimo-4
    python launch/tpu.py delete mimo-4
"""

from __future__ import annotations

import argparse
import shlex
import sys

import source
from cloud import Cloud, CommandError, Retry, log_with_time
from queued import Spec
from supervise import Policy, RunFailed, Supervisor


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 the run failed, 2 wrong arguments, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:cut])
    arguments.fields = argv[cut + 1 :]
    try:
        return arguments.act(arguments)
    except (RunFailed, CommandError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    revision = source.commit(arguments.dirty)
    source.require(revision, arguments.config)
    spec = Spec(
        name=arguments.name,
        accelerator=arguments.type,
        zone=arguments.zone,
        config=arguments.config,
        output=arguments.output,
        revision=revision,
        fields=tuple(arguments.fields),
        slices=arguments.slices,
        tier="spot" if arguments.spot else "reserved" if arguments.reserved else "on-demand",
        project=arguments.project,
        runtime=arguments.runtime,
        valid_until=arguments.valid_until,
        extra_create=tuple(arguments.create_flag),
        extra_ssh=tuple(arguments.ssh_flag),
    )
    if arguments.dry_run:
        _print_commands(spec)
        return 0
    archive = source.archive(revision, spec.folder)
    spec.save()
    return _supervise(Supervisor(spec, archive, _cloud(arguments), _policy(arguments), _out), new=True)


def _follow(arguments: argparse.Namespace) -> int:
    spec = Spec.load(arguments.name)
    archive = source.archive(spec.revision, spec.folder)
    return _supervise(Supervisor(spec, archive, _cloud(arguments), _policy(arguments), _out), new=False)


def _supervise(supervisor: Supervisor, new: bool) -> int:
    """Run or follow; whatever happens, end with what is still billed."""
    spec, log = supervisor.spec, supervisor.cloud.log
    try:
        if new:
            supervisor.run()
        else:
            supervisor.watch(fresh=False)
        return 0
    except KeyboardInterrupt:
        if supervisor.started:
            log("the job goes on without you: nobody asks for new machines, and nobody deletes them at its end")
            log(f"follow it again: python launch/tpu.py follow {spec.name}")
            log(spec.bill())
        else:
            log("interrupted before the job started: deleting the request, which may be billed once it is granted")
            supervisor.delete()
            log("deleted")
        return 130
    except CommandError:
        # Refused before anything was made, or broken off with machines that run: the user must know which.
        try:
            left = supervisor.state()
        except CommandError:
            left = "in a state that could not be asked for"
        log(f"{spec.name} is {left}. {spec.bill()}" if left else "no machine was left; nothing is billed")
        raise


def _status(arguments: argparse.Namespace) -> int:
    spec, cloud = Spec.load(arguments.name), _cloud(arguments)
    state = Supervisor(spec, spec.folder, cloud, Policy(), _out).state()
    print(f"{spec.name}: {state or 'no such resource, nothing is billed'}")
    if state == "ACTIVE":
        print(cloud.run(spec.worker("status")), end="")
    if state:
        print(spec.bill())
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    spec, cloud = Spec.load(arguments.name), _cloud(arguments)
    Supervisor(spec, spec.folder, cloud, Policy(), _out).delete()
    print(f"{spec.name} is deleted")
    return 0


def _print_commands(spec: Spec) -> None:
    """Print the commands of a run in which nothing goes wrong, as one could type them."""
    archive = spec.folder / f"jvlm-{spec.revision[:12]}.tar.gz"
    steps = (
        ("the code, at its commit", ["git", "archive", "--format=tar.gz", f"--output={archive}", spec.revision]),
        ("ask for the machines", spec.create()),
        ("again and again until its state is ACTIVE", spec.describe()),
        ("ship", spec.copy(archive)),
        ("unpack", spec.unpack(archive)),
        ("install", spec.worker("install", "tpu,gcs")),
        ("start, detached", spec.worker("start", *spec.train)),
        ("again and again: worker 0's log", spec.worker("log", "0", everywhere=False)),
        ("again and again: has a worker ended?", spec.worker("status")),
        ("at the end, and before new machines are asked for after a preemption", spec.delete()),
    )
    for what, command in steps:
        print(f"# {what}\n{shlex.join(command)}")


def _cloud(arguments: argparse.Namespace) -> Cloud:
    return Cloud(retry=Retry(seconds=arguments.retry_seconds), log=log_with_time)


def _policy(arguments: argparse.Namespace) -> Policy:
    return Policy(
        poll=arguments.poll,
        follow=arguments.poll / 2,
        preemptions=arguments.max_preemptions,
        crashes=arguments.restart_crashed,
        keep=arguments.keep,
    )


def _out(text: str) -> None:
    print(text, end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="create, ship, start, follow, delete", epilog="after -- come fields for jvlm train: -- --steps 100"
    )
    run.add_argument("config", help="a file of the commit with get_config(), or its name under configs/")
    run.add_argument("--name", required=True, help="of the resource and of the run")
    run.add_argument("--type", required=True, help="accelerator type: v5p-128, v6e-256, v5litepod-16, v4-32")
    run.add_argument("--zone", required=True, help="such as us-east5-a")
    run.add_argument("--output", required=True, help="gs:// folder; the run is its sub-folder NAME")
    run.add_argument("--slices", type=int, default=1, help="how many of that type, joined by the slow network")
    tier = run.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheap, may be taken away at any time")
    tier.add_argument("--reserved", action="store_true", help="from your project's reservation")
    run.add_argument("--project", help="default: gcloud's")
    run.add_argument("--runtime", help="TPU software version (default: the one for the type)")
    run.add_argument("--valid_until", metavar="DURATION", help="give up waiting after, such as 12h")
    run.add_argument("--dirty", action="store_true", help="ship uncommitted changes too")
    run.add_argument("--create_flag", action="append", default=[], help="of gcloud's create, such as --network=mine")
    run.add_argument("--ssh_flag", action="append", default=[], help="of gcloud's ssh and scp: --tunnel-through-iap")
    run.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    run.set_defaults(act=_run)

    follow = commands.add_parser("follow", help="go on watching a run: log, failures, preemption, deletion")
    follow.set_defaults(act=_follow)
    status = commands.add_parser("status", help="of the resource and of each worker")
    status.set_defaults(act=_status)
    delete = commands.add_parser("delete", help="the machines, at once; files on gs:// stay")
    delete.set_defaults(act=_delete)
    for command in (follow, status, delete):
        command.add_argument("name")
    for command in (run, follow):
        command.add_argument("--keep", action="store_true", help="do not delete the machines at the end")
        command.add_argument("--max_preemptions", type=int, default=100, help="how often to ask for new machines")
        command.add_argument(
            "--restart_crashed", type=int, default=0, help="times to start a crashed job again in place"
        )
        command.add_argument("--poll", type=float, default=30.0, help="seconds between polls")
    for command in (run, follow, status, delete):
        command.add_argument("--retry_seconds", type=float, default=5.0, help="first wait after a transient failure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
