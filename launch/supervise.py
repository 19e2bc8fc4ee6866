"""From a spec to a finished run: create, ship, start, watch, create again after preemption, delete."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from cloud import Cloud, CommandError
from queued import Spec

WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
GONE = ("", "SUSPENDING", "SUSPENDED", "DELETING", "FAILED")
# `jvlm train` ends so after SIGTERM (jvlm/training/interruption.py)
SAVED_AND_STOPPED = "75"
STATUS = re.compile(r"JVLM-STATUS worker=(\S+) state=(\w+) code=(\S+) time=(\S+)")


class Preempted(Exception):
    """The machines are gone; a new set may go on from the last checkpoint."""


class Stopped(Exception):
    """The job saved and ended because it was told to; the machines may be there still."""


class RunFailed(Exception):
    """The run cannot go on; its machines are deleted, or the message says what they cost."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """The state of one worker's job; see worker.sh."""

    name: str
    state: str
    code: str
    ended: str

    @property
    def stopped(self) -> bool:
        return self.state == "exited" and self.code == SAVED_AND_STOPPED

    @property
    def failed(self) -> bool:
        return self.state == "lost" or (self.state == "exited" and self.code != "0")

    def describe(self) -> str:
        return f"{self.name}: exit status {self.code}" if self.state == "exited" else f"{self.name}: {self.state}"


@dataclasses.dataclass(frozen=True)
class Policy:
    """How patient the supervision is.

    Attributes:
      poll: seconds between polls of the queue.
      follow: seconds between polls of the log; at every ``probe_every``-th, all workers are probed.
      preemptions: how often new machines are asked for.
      crashes: how often a crashed job is started again on the same machines.
      silent: polls in a row without an answer from a worker, after which the machines count as gone.
    """

    poll: float = 30.0
    follow: float = 15.0
    probe_every: int = 4
    preemptions: int = 100
    crashes: int = 0
    silent: int = 3
    keep: bool = False


class Supervisor:
    """Runs one spec to its end.

    The run is safe to repeat: `jvlm train` goes on from the newest checkpoint of its folder.
    """

    def __init__(self, spec: Spec, archive: Path, cloud: Cloud, policy: Policy, out: Callable[[str], None]):
        self.spec, self.archive, self.cloud, self.policy, self.out = spec, archive, cloud, policy, out
        self.started = False  # a job runs that Ctrl-C should leave alone
        self._preempted = 0

    def run(self) -> None:
        """Create, run and delete.

        Raises:
          RunFailed: creation refused, or the job failed. CommandError: gcloud failed where no retry helps.
        """
        if state := self.state():
            raise ValueError(
                f"{self.spec.name} exists already and is {state}: follow it "
                f"(python launch/tpu.py follow {self.spec.name}), or choose another --name"
            )
        self._create()
        self.watch(fresh=True)

    def watch(self, fresh: bool) -> None:
        """From an existing resource on: with ``fresh`` ship and start, else only follow what runs already."""
        crashes, start = 0, fresh
        while True:
            try:
                self._wait_until_active()
                if start:
                    self._ship_and_start()
                self.started = True
                self.cloud.log("following worker 0; Ctrl-C leaves the job running")
                failed = self._follow()
            except Preempted as reason:
                self.started = False
                self._restart(str(reason))
                start = True
                continue
            except Stopped:
                self._count_preemption("the job was told to stop, and saved")
                start = True
                continue
            if not failed:
                self.cloud.log("every worker ended with status 0")
                self._finish()
                return
            crashes += 1
            self._report(failed)
            if crashes > self.policy.crashes:
                self.started = False
                self._finish()
                raise RunFailed(f"{failed[0].describe()} (first of {len(failed)}); logs in {self.spec.folder}")
            self.cloud.log(f"starting again on the same machines, {crashes} of {self.policy.crashes}")
            start = True

    def state(self) -> str:
        """Of the queued resource; "" where there is none."""
        found = self.cloud.json(self.spec.describe(), expect="missing")
        return found.get("state", {}).get("state", "") if found else ""

    def delete(self) -> None:
        """End the bill; where that fails, say what is still billed."""
        try:
            self.cloud.run(self.spec.delete(), expect="missing")
        except CommandError:
            self.cloud.log(f"NOT deleted. {self.spec.bill()}")
            raise

    def _create(self) -> None:
        """Ask for the resource, which is known not to exist: where it does, a retried request got through after all."""
        self.cloud.log(
            f"asking for {self.spec.chips} chips: {self.spec.accelerator} x {self.spec.slices}, {self.spec.tier}"
        )
        self.cloud.run(self.spec.create(), expect="exists")

    def _wait_until_active(self) -> None:
        last = None
        while True:
            state = self.state()
            if state != last:
                self.cloud.log(f"queued resource {self.spec.name}: {state or 'gone'}")
                last = state
            if state == "ACTIVE":
                return
            if state == "FAILED":
                why = self._failure()
                self.delete()
                raise RunFailed(f"the request failed and was deleted: {why}")
            if state in GONE:
                raise Preempted(f"the resource is {state.lower() or 'gone'}")
            if state not in WAITING:
                raise RunFailed(f"unknown state {state!r} of {self.spec.name}. {self.spec.bill()}")
            time.sleep(self.policy.poll)

    def _failure(self) -> str:
        found = self.cloud.json(self.spec.describe(), expect="missing").get("state", {})
        return found.get("failedData", {}).get("error", {}).get("message", "no reason was given")

    def _ship_and_start(self) -> None:
        steps = (
            ("shipping the code", self.spec.copy(self.archive)),
            ("unpacking", self.spec.unpack(self.archive)),
            ("installing", self.spec.worker("install", "tpu,gcs")),
            ("starting", self.spec.worker("start", *self.spec.train)),
        )
        for what, command in steps:
            self.cloud.log(f"{what} on every worker")
            try:
                self.cloud.run(command)
            except CommandError:
                if self.state() in GONE:
                    raise Preempted(f"the machines went while {what}") from None
                raise

    def _follow(self) -> list[Worker]:
        """Print worker 0's log until all jobs have ended (gives []) or some failed (gives them, earliest first)."""
        offset, silent, turn, expected = 0, 0, 0, 0
        while True:
            try:
                offset = self._print_log(offset)
                workers = self._workers() if turn % self.policy.probe_every == 0 else None
                silent = 0
            except CommandError as error:
                silent += 1
                state = self.state()
                if state in GONE or silent >= self.policy.silent:
                    raise Preempted(f"no answer from the workers, resource {state.lower() or 'gone'}") from None
                self.cloud.log(f"no answer from the workers ({error.kind}), looking again")
                workers = None
            turn += 1
            if workers is not None:
                expected = max(expected, len(workers))
                if any(w.stopped for w in workers):
                    # one that is told to stop takes the others with it, by saving or by dying of its silence
                    if all(w.state != "running" for w in workers):
                        self._print_log(offset)
                        raise Stopped
                    time.sleep(self.policy.follow)
                    turn = 0
                    continue
                failed = sorted((w for w in workers if w.failed), key=lambda w: (not w.ended.isdigit(), w.ended))
                if failed:
                    return failed
                if len(workers) == expected and all(w.state == "exited" for w in workers):
                    self._print_log(offset)
                    return []
            time.sleep(self.policy.follow)

    def _print_log(self, offset: int) -> int:
        """Print what worker 0's log has beyond an offset; returns the new one."""
        while True:
            text = self.cloud.run(self.spec.worker("log", str(offset), everywhere=False), retry=False)
            found = re.search(r"^JVLM-LOG (\d+)\n", text, re.MULTILINE)
            if not found or int(found[1]) == offset:
                return offset
            offset = int(found[1])
            self.out(text[found.end() :])

    def _workers(self) -> list[Worker]:
        text = self.cloud.run(self.spec.worker("status"), retry=False)
        return [Worker(*found) for found in STATUS.findall(text)]

    def _report(self, failed: list[Worker]) -> None:
        """Name the workers, stop the others, and keep the ends of all logs."""
        for worker in failed:
            self.cloud.log(f"FAILED {worker.describe()}")
        tails = self.cloud.run(self.spec.worker("tail", "200"))
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        (self.spec.folder / "failed.log").write_text(tails)
        self.out("\n".join(deque(tails.splitlines(), maxlen=40)) + "\n")
        self.cloud.run(self.spec.worker("stop", "60"))

    def _restart(self, why: str) -> None:
        """Delete what is left and ask for new machines."""
        self._count_preemption(why)
        self.delete()
        self._create()

    def _count_preemption(self, why: str) -> None:
        self._preempted += 1
        if self._preempted > self.policy.preemptions:
            self.delete()
            raise RunFailed(f"{why}; it went on {self.policy.preemptions} times already; deleted")
        self.cloud.log(f"{why}; going on, {self._preempted} of {self.policy.preemptions} times")

    def _finish(self) -> None:
        if self.policy.keep:
            self.cloud.log(f"kept, as asked. {self.spec.bill()}")
            return
        self.delete()
        self.cloud.log("deleted; nothing of this run is billed any more but its files on gs://")
