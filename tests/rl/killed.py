"""Run by test_kill.py and test_processes.py: `jvlm rl` on the small policy of a folder, whose rewards take any time.

python -m tests.rl.killed FOLDER STEPS [ADDRESS PROCESSES PROCESS [DRAWING]]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from jvlm.parallel import hosts
from jvlm.rl.run import train
from jvlm.training.config import CheckpointConfig
from tests.rl.support import policy_experiment


def main(folder: str, steps: int, *processes: str) -> None:
    """Train; every other step is saved, and the journal is kept. DRAWING devices of each process do not train."""
    experiment = policy_experiment(Path(folder), steps=steps)
    task, drawing = experiment.task, None
    if processes:
        address, count, process, *rest = processes
        drawing = int(*rest) if rest else None
        hosts.initialise(address, int(count), int(process), timeout=120)
    task = dataclasses.replace(task, rollout=dataclasses.replace(task.rollout, devices=drawing))
    checkpoint = CheckpointConfig(save_interval_steps=2, max_to_keep=steps)
    train(dataclasses.replace(experiment, task=task, checkpoint=checkpoint))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
