"""``jvlm rl-samples``: the groups of a step as a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class RlSamples:
    """Write a page of what a step sampled: pictures with all boxes of a group, answers, rewards, reasons, advantages.

    Attributes:
      run: folder of a run of jvlm rl.
      step: to show; None is the last that is stored.
      output: the page to write; None is samples.html in the run.
    """

    run: Positional[Path]
    step: int | None = None
    output: Path | None = None


def run(words: list[str]) -> int:
    given = parse(RlSamples, words, "jvlm rl-samples")

    from jvlm.data.view.page import check_target, write
    from jvlm.errors import UserError
    from jvlm.rl import rollout_files, samples

    folder = given.run / rollout_files.ROLLOUTS
    target = given.output or given.run / samples.SAMPLES
    there = rollout_files.steps(folder)
    if not there:
        raise UserError(f"{folder} holds no rollouts: give the folder of a run of jvlm rl, with task.log.store")
    check_target(target)
    step = there[-1] if given.step is None else given.step
    write(target, samples.page_of(folder, step))
    print(f"step {step}, of {there[0]} to {there[-1]}: {target}")
    return 0
