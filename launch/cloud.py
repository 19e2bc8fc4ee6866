"""Run gcloud, kubectl, xpk or ssh; name the kind of a failure; retry transient ones."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Words in a command's error output, and what they mean; the first that matches counts. From Google's API error codes
# (google.rpc.Code) and the messages of gcloud's ssh and scp.
KINDS = (
    ("login", r"gcloud auth login|no active account|Reauthentication|invalid_grant|UNAUTHENTICATED"),
    ("quota", r"(?i)quota[^\n]*(exceeded|limit)|exceed[^\n]*quota|QUOTA_EXCEEDED"),
    ("capacity", r"no more capacity|RESOURCE_EXHAUSTED|(?i:stockout)|not enough resources"),
    ("exists", r"ALREADY_EXISTS|already exists"),
    ("missing", r"NOT_FOUND|was not found"),
    ("denied", r"PERMISSION_DENIED|does not have permission|has not been used in project|is disabled"),
    (
        "transient",
        r"UNAVAILABLE|DEADLINE_EXCEEDED|\bINTERNAL\b|ABORTED|\b50[0234]\b|Connection (reset|refused|timed out|closed)|"
        r"timed out|Temporary failure in name resolution|Broken pipe|kex_exchange_identification|return code \[255\]|"
        r"Network is unreachable",
    ),
)
ADVICE = {
    "login": "run `gcloud auth login`",
    "quota": "ask for more (README: Quota), or try a smaller --type, another --zone, or --spot, which has its own",
    "capacity": "the zone has no free chips: try another --zone, a smaller --type, or a reservation",
    "exists": "choose another --name, or look at the one there: `python launch/tpu.py status`",
    "denied": "the account lacks a role or the API is off (README: Once per project)",
}


class CommandError(Exception):
    """A command that failed. ``kind`` is a key of ADVICE, "missing", "transient" (worth a retry), or "other"."""

    def __init__(self, command: Sequence[str], status: int, output: str):
        self.command, self.status, self.output = list(command), status, output.strip()
        self.kind = next((name for name, words in KINDS if re.search(words, output)), "other")
        advice = f"\n{ADVICE[self.kind]}" if self.kind in ADVICE else ""
        super().__init__(f"exit status {status} of {shlex.join(command)}\n{self.output}{advice}")


@dataclasses.dataclass(frozen=True)
class Retry:
    """How often a transient failure is tried again, and the seconds before the first; they double, up to a minute."""

    times: int = 5
    seconds: float = 5.0

    def delays(self) -> list[float]:
        return [min(self.seconds * 2**i, 60.0) for i in range(self.times)]


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Runs commands.

    Attributes:
      retry: for failures that pass by themselves.
      dry_run: print each command and run none; every answer is empty.
      log: where lines for the user go.
    """

    retry: Retry = Retry()
    dry_run: bool = False
    log: Callable[[str], None] = print

    def run(self, command: Sequence[str], *, retry: bool = True, expect: str = "") -> str:
        """Return the standard output of a command.

        Args:
          command: program and arguments; no shell between.
          retry: whether a transient failure is tried again. Not for what must happen once only.
          expect: kind of failure that is an answer too: it gives "" and no error.

        Raises:
          CommandError: it failed, and was tried again as often as `retry` says where that may help.
          FileNotFoundError: the program is not installed.
        """
        if self.dry_run:
            self.log(shlex.join(command))
            return ""
        delays = self.retry.delays() if retry else []
        while True:
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{command[0]} is not installed or not on PATH (README: Once per laptop)"
                ) from None
            if done.returncode == 0:
                return done.stdout
            error = CommandError(command, done.returncode, done.stderr + done.stdout)
            if expect and error.kind == expect:
                return ""
            if error.kind != "transient" or not delays:
                raise error
            wait = delays.pop(0)
            self.log(f"transient failure, again in {wait:.0f} s: {error.output[-200:]}")
            time.sleep(wait)

    def json(self, command: Sequence[str], *, expect: str = "") -> dict[str, Any]:
        """Return the standard output of a command that prints JSON; {} for the failure that was expected."""
        text = self.run(command, expect=expect)
        return json.loads(text) if text.strip() else {}


def log_with_time(line: str) -> None:
    """Print a line with the time of day, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
