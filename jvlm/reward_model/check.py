"""What a reward model is worth before it is used: pair accuracy, length bias, and whether it looks at the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Image, Video
from jvlm.data.errors import ExampleError, Rejected, grouped
from jvlm.data.examples import parse_example
from jvlm.data.mixture.examples import Examples
from jvlm.data.packing import Example
from jvlm.data.preferences import pair
from jvlm.errors import UserError
from jvlm.reward_model.scale import RewardScale
from jvlm.reward_model.scoring import RewardModel
from jvlm.scoring.statistics import Interval, mean_interval

_LONG = 0.7  # correlation of reward and length above which length explains most of the order


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of pairs with its 95 % interval, and of how many; None of none."""

    of: int
    share: Interval | None

    @classmethod
    def of_pairs(cls, right: Sequence[bool] | np.ndarray) -> Share:
        values = np.asarray(right, np.float64)
        return cls(len(values), mean_interval(values) if len(values) else None)

    def __str__(self) -> str:
        if self.share is None:
            return "none"
        return (
            f"{100 * self.share.value:.1f} % of {self.of} ({100 * self.share.low:.1f} to {100 * self.share.high:.1f})"
        )


@dataclasses.dataclass(frozen=True)
class RewardCheck:
    """The report.

    Attributes:
      accuracy: pairs whose chosen answer scores higher; ties are wrong.
      chosen_longer, chosen_shorter: the same, of pairs whose chosen answer has more, or fewer, tokens.
      length_only: what "the longer answer is better" would get.
      length_correlation: rank correlation, over pairs, of the difference of scores and that of lengths.
      with_picture: accuracy on pairs with a picture or video; ``without_picture``: on the same, with it removed.
      left_out: pairs that cannot be read.
      scores: of all answers, chosen ones first.
    """

    accuracy: Share
    chosen_longer: Share
    chosen_shorter: Share
    length_only: Share
    length_correlation: float
    with_picture: Share
    without_picture: Share
    left_out: tuple[Rejected, ...]
    scores: tuple[float, ...]

    @property
    def warnings(self) -> list[str]:
        """What speaks against using the model."""
        found = []
        if self.accuracy.share.low <= 0.5:
            found.append("it does not order pairs better than a coin does")
        if self.length_only.share is not None and self.accuracy.share.value <= self.length_only.share.value:
            found.append("it orders pairs no better than the rule that the longer answer is better")
        if abs(self.length_correlation) >= _LONG:
            found.append(f"its order follows the length of answers (rank correlation {self.length_correlation:.2f})")
        seen, blind = self.with_picture.share, self.without_picture.share
        if seen is not None and blind.value >= seen.value:
            found.append("it orders pairs as well without their pictures: it does not look at them")
        return found

    def text(self) -> str:
        """Return the report for the terminal."""
        lines = [
            f"pair accuracy                 {self.accuracy}",
            f"  chosen answer longer        {self.chosen_longer}",
            f"  chosen answer shorter       {self.chosen_shorter}",
            f"  by length alone             {self.length_only}",
            f"rank correlation with length  {self.length_correlation:.2f}",
        ]
        if self.with_picture.of:
            lines += [f"pairs with pictures           {self.with_picture}"]
            lines += [f"  pictures removed            {self.without_picture}"]
        if self.left_out:
            lines.append(f"{len(self.left_out)} pairs left out:\n{grouped(self.left_out)}")
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def check(model: RewardModel, files: Sequence[str], *, max_pairs: int | None = None) -> RewardCheck:
    """Score the pairs of files of any format of preferences.

    Raises:
      UserError: no pair can be read.
    """
    source = Examples.open(DataConfig(train=tuple(files), preference="pairs"))
    pairs: list[tuple[Conversation, Conversation]] = []
    examples: list[tuple[Example, Example]] = []
    left_out: list[Rejected] = []
    for number in range(min(len(source), max_pairs or len(source))):
        origin, record = source[number]
        try:
            if isinstance(record, ExampleError):
                raise record
            both = pair(parse_example(record, origin)).conversations
            encoded = tuple(map(model.processor.encode, both))
        except ExampleError as error:
            left_out.append(Rejected.of(error, "bad"))
            continue
        pairs.append(both)
        examples.append(encoded)
    if not pairs:
        raise UserError(f"{', '.join(files)}: no pair can be read:\n{grouped(left_out)}")
    scores = _scores(model, examples)
    lengths = np.asarray([[one.length for one in both] for both in examples], np.float64)
    right, longer = scores[:, 0] > scores[:, 1], lengths[:, 0] - lengths[:, 1]
    seen = np.asarray([bool(both[0].media) for both in pairs])
    blind = np.zeros(0, bool)
    if seen.any():
        bare = [tuple(map(_without_media, both)) for both, has in zip(pairs, seen, strict=True) if has]
        without = _scores(model, [tuple(map(model.processor.encode, both)) for both in bare])
        blind = without[:, 0] > without[:, 1]
    return RewardCheck(
        accuracy=Share.of_pairs(right),
        chosen_longer=Share.of_pairs(right[longer > 0]),
        chosen_shorter=Share.of_pairs(right[longer < 0]),
        length_only=Share.of_pairs((longer > 0)[longer != 0]),
        length_correlation=_rank_correlation(scores[:, 0] - scores[:, 1], longer),
        with_picture=Share.of_pairs(right[seen]),
        without_picture=Share.of_pairs(blind),
        left_out=tuple(left_out),
        scores=tuple(np.concatenate([scores[:, 0], scores[:, 1]]).tolist()),
    )


def fitted_scale(report: RewardCheck, files: Sequence[str]) -> RewardScale:
    """Return the scale of the scores that a check has seen."""
    return RewardScale.fit(report.scores, files)


def values_of(report: RewardCheck) -> dict[str, Any]:
    """Return the report as plain values, without the scores."""
    values = dataclasses.asdict(report)
    del values["scores"]
    return {**values, "warnings": report.warnings}


def _scores(model: RewardModel, pairs: Sequence[tuple[Example, Example]]) -> np.ndarray:
    return np.asarray(model.scores_of([one for both in pairs for one in both])).reshape(-1, 2)


def _without_media(conversation: Conversation) -> Conversation:
    messages = tuple(
        dataclasses.replace(m, content=tuple(part for part in m.content if not isinstance(part, Image | Video)))
        for m in conversation.messages
    )
    return dataclasses.replace(conversation, messages=messages)


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where one of them does not vary."""
    from scipy import stats

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(stats.spearmanr(one, other).statistic)
