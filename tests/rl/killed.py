"""Run by test_kill.py: `jvlm rl` on the small policy of a folder, whose rewards take any time."""

from __future__ import annotations

import sys
from pathlib import Path

from jvlm.rl.run import train
from jvlm.training.config import CheckpointConfig
from tests.rl.support import policy_experiment


def main(folder: str, steps: int) -> None:
    """Train; every other step is saved, and the journal is kept."""
    checkpoint = CheckpointConfig(save_interval_steps=2, max_to_keep=steps)
    train(policy_experiment(Path(folder), steps=steps, checkpoint=checkpoint))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
