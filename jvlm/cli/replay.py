"""``jvlm replay``: a step once more, or why it was not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class Replay:
    """Find the tower and the conversation of a stopped run that are not finite; or repeat a step of jvlm rl.

    A step is repeated from its stored answers: what their rewards weigh, and, where the step before has a checkpoint,
    loss and gradient. Ends with status 1 if something is not equal to the last bit.

    Attributes:
      folder: OUTPUT/nonfinite/FIRST-LAST, as the run named it when it stopped; with ``step`` the run of jvlm rl.
      step: to repeat.
    """

    folder: Positional[Path]
    step: int | None = None


def run(words: list[str]) -> int:
    options = parse(Replay, words, "jvlm replay")

    if options.step is None:
        from jvlm.training import replay

        for line in replay.replay(options.folder):
            print(line, flush=True)
        return 0

    from jvlm.rl import replay as rl_replay
    from jvlm.weights import run_dir

    different, with_model = 0, False
    for comparison in rl_replay.replay(options.folder, options.step):
        print(comparison.line(), flush=True)
        different += not comparison.equal
        with_model = with_model or comparison.name == "loss"
    if not with_model:
        steps = ", ".join(str(step + 1) for step in run_dir.steps(options.folder))
        print(
            f"the model before step {options.step} is not stored, so its loss was not computed again; that can be done "
            f"for steps 1, {steps}"
        )
    return 1 if different else 0
