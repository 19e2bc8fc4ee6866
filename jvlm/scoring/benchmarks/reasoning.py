"""Scores over groups of questions: DynaMath's worst case, WeMath's strict score."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence


def worst_case(scores: Iterable[tuple[Hashable, float]]) -> float:
    """Return the share of groups in which every score is 1 (DynaMath, arXiv 2411.00836: ten variants of a question)."""
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for group, score in scores:
        groups[group].append(score)
    return sum(min(values) == 1 for values in groups.values()) / len(groups) if groups else 0.0


@dataclasses.dataclass(frozen=True)
class WeMath:
    """Shares of WeMath's composed problems (arXiv 2407.01284).

    Attributes:
      insufficient_knowledge: composed and a step wrong.
      inadequate_generalization: composed wrong, every step right.
      rote_memorization: composed right, a step wrong.
      complete_mastery: all right.
    """

    insufficient_knowledge: float
    inadequate_generalization: float
    rote_memorization: float
    complete_mastery: float

    @property
    def strict(self) -> float:
        """Return mastery and half of inadequate generalization."""
        return self.complete_mastery + 0.5 * self.inadequate_generalization


def wemath(problems: Sequence[Mapping[str, float | Sequence[float]]], *, loose: bool = False) -> WeMath:
    """Return the four shares.

    Args:
      problems: ``composed``, the score of a problem, and ``steps``, those of the questions that it is made of.
      loose: take a problem as memorised only if all its steps are wrong, not any.
    """
    counts = dict.fromkeys(("insufficient", "inadequate", "rote", "mastery"), 0)
    for problem in problems:
        right, steps = problem["composed"] == 1, [step == 1 for step in problem["steps"]]
        knows = any(steps) if right and loose else all(steps)
        name = ("mastery" if knows else "rote") if right else ("inadequate" if knows else "insufficient")
        counts[name] += 1
    total = max(len(problems), 1)
    return WeMath(*(counts[name] / total for name in ("insufficient", "inadequate", "rote", "mastery")))
