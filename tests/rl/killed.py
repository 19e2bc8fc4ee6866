"""Run by test_kill.py: `jvlm rl` on the small policy of a folder, whose rewards take any time."""

from __future__ import annotations

import sys
from pathlib import Path

from jvlm.rl.run import train
from jvlm.training.config import CheckpointConfig
from tests.rl.support import policy_experiment

STEPS = 6


def main(folder: str) -> None:
    """Train; every other step is saved, and the journal is kept."""
    checkpoint = CheckpointConfig(save_interval_steps=2, max_to_keep=STEPS)
    train(policy_experiment(Path(folder), steps=STEPS, checkpoint=checkpoint))


if __name__ == "__main__":
    main(sys.argv[1])
