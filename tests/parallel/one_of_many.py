"""Run by test_hosts.py in several processes at once: a process of a run, or of a step with batches of its own.

one_of_many.py train ADDRESS PROCESSES PROCESS FOLDER ROWS [--field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from jvlm.parallel import hosts


def train(folder: str, rows: str, *overrides: str) -> None:
    """The demo, small, with 4 rows a step and its devices as the mesh says."""
    from jvlm.training import loop
    from tests.training import support

    fields = ("--data.rows", "4", "--steps", "4")
    loop.train(support.experiment(Path(folder), Path(rows), *fields, *overrides))


if __name__ == "__main__":
    job, address, processes, process, *rest = sys.argv[1:]
    if int(processes) > 1:
        hosts.initialise(address, int(processes), int(process))
    globals()[job](*rest)
