"""``jvlm reward-check``: what a reward model is worth, before it is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm import options
from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class RewardCheckOptions:
    """Score pairs of answers: accuracy, length bias, and the same with pictures removed.

    Ends with status 1 where something speaks against using the model.

    Attributes:
      model: run or Hugging Face folder of a reward model.
      data: files of pairs, of any format that jvlm rlhf reads; best those that it was not trained on.
      max_pairs: look at so many; None takes all.
      batch_size: packed sequences that are computed together.
      fit_scale: write reward_scale.json into the folder, by which rewards lie between 0 and 1 from then on.
      output: JSON file for the numbers; None writes none.
    """

    model: Positional[str]
    data: tuple[str, ...] = ()
    max_pairs: int | None = None
    batch_size: int = 1
    fit_scale: bool = False
    output: str | None = None


def run(words: list[str]) -> int:
    given = options.parse(RewardCheckOptions, words, "jvlm reward-check")
    if not given.data:
        raise UserError("--data is missing: give a file of pairs")
    from jvlm.reward_model import check
    from jvlm.reward_model.scoring import RewardModel
    from jvlm.training.side_files import write_json

    model = RewardModel.load(given.model, batch_size=given.batch_size)
    report = check.check(model, given.data, max_pairs=given.max_pairs)
    print(report.text())
    if given.output is not None:
        write_json(Path(given.output), check.values_of(report))
    if given.fit_scale:
        scale = check.fitted_scale(report, given.data)
        scale.write(Path(given.model))
        print(f"scale: a score of {scale.mean:.4g} is 0.5, one of {scale.mean + scale.std:.4g} is 0.73")
    return 1 if report.warnings else 0
