"""Verifiable rewards: strict rules of `jvlm.scoring`, with references as they stand in data."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jvlm
from jvlm.data.values import number, whole
from jvlm.errors import UserError
from jvlm.rl.rewards.source import RewardItem
from jvlm.scoring.actions import action
from jvlm.scoring.answers import answer
from jvlm.scoring.benchmarks.documents import anls
from jvlm.scoring.benchmarks.reading import squad_f1
from jvlm.scoring.choice import choice
from jvlm.scoring.counts import MOST, count
from jvlm.scoring.maths import MathVerifier
from jvlm.scoring.regions import boxes, points
from jvlm.scoring.score import Score
from jvlm.scoring.spans import span
from jvlm.scoring.words import words

Options = Mapping[str, Any]


class _Unusable(ValueError):
    """A reference that a rule cannot read; says what it reads."""


def _choice(item: RewardItem, options: Options) -> Score:
    gold, texts = item.gold, item.columns.get("options", ())
    texts = list(texts.values()) if isinstance(texts, Mapping) else texts
    if not isinstance(texts, list | tuple) or len(texts) > 26 or not all(isinstance(text, str) for text in texts):
        raise _Unusable("write options: at most 26 texts")
    last = chr(ord("A") + (len(texts) or 10) - 1)
    if not isinstance(gold, str) or not gold or any(not "A" <= letter <= last for letter in gold):
        raise _Unusable(f"write the letter of the right option, A to {last}, or several as AC")
    return choice(item.answer, gold, texts, thinking_opened=item.thinking_opened, **options)


def _text(item: RewardItem, options: Options) -> Score:
    golds = [item.gold] if isinstance(item.gold, str) else item.gold
    if not isinstance(golds, list | tuple) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
        raise _Unusable("write a text that is not empty, or a list of them")
    match options.get("metric", "exact"):
        case "exact":
            return words(item.answer, golds, thinking_opened=item.thinking_opened)
        case metric:
            content = answer(item.answer, thinking_opened=item.thinking_opened)
            if isinstance(content, Score):
                return content
            return Score({"anls": anls, "f1": squad_f1}[metric](content, golds), "ok", content[:300])


def _count(item: RewardItem, options: Options) -> Score:
    gold = whole(item.gold)
    if gold is None or not 0 <= gold <= MOST:
        raise _Unusable(f"write a whole number from 0 to {MOST}")
    return count(item.answer, gold, thinking_opened=item.thinking_opened, **options)


def _numbers(values: Any, length: int) -> list[float]:
    found = [number(value) for value in values] if isinstance(values, list | tuple) else []
    plain = [float(value) for value in found if value is not None]
    if len(plain) != length or len(found) != length or not all(map(math.isfinite, plain)):
        raise _Unusable(f"write lists of {length} numbers")
    return plain


def _box(value: Any) -> tuple[str, list[float]]:
    """Read a box with its label: [x1, y1, x2, y2], ["label", [...]] or {"bbox_2d": [...], "label": ...}."""
    label = ""
    if isinstance(value, Mapping):
        label, value = value.get("label") or "", value.get("bbox_2d", value.get("box"))
    elif isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str):
        label, value = value
    box = _numbers(value, 4)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise _Unusable(f"the box {box} has no area; write x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    return str(label), box


def _listed(gold: Any) -> list[Any]:
    if not isinstance(gold, list | tuple):
        raise _Unusable("write a list of boxes")
    return [gold] if len(gold) == 4 and all(number(value) is not None for value in gold) else list(gold)


def _boxes(item: RewardItem, options: Options) -> Score:
    golds = [_box(value) for value in _listed(item.gold)]
    size = _numbers(item.columns.get("size"), 2)
    if min(size) <= 0:
        raise _Unusable("write size: [width, height] of the image in the space of the boxes")
    return boxes(item.answer, golds, (size[0], size[1]), thinking_opened=item.thinking_opened, **options)


def _points(item: RewardItem, options: Options) -> Score:
    golds = [_box(value)[1] for value in _listed(item.gold)]
    if not golds:
        raise _Unusable("write the box of each point")
    return points(item.answer, golds, thinking_opened=item.thinking_opened, **options)


def _span(item: RewardItem, options: Options) -> Score:
    start, end = _numbers(item.gold, 2)
    if not 0 <= start < end:
        raise _Unusable("write [start, end] in seconds, start before end")
    return span(item.answer, (start, end), thinking_opened=item.thinking_opened, **options)


def _gui(item: RewardItem, options: Options) -> Score:
    if not isinstance(item.gold, Mapping) or not isinstance(item.gold.get("action"), str):
        raise _Unusable('write {"action": ..., ...}')
    gold = {name: _numbers(v, 4) if name in ("box", "end_box") else v for name, v in item.gold.items()}
    return action(item.answer, gold, thinking_opened=item.thinking_opened)


def _maths(item: RewardItem, options: Options) -> Score:
    gold = item.gold
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or not str(gold).strip():
        raise _Unusable("write an expression of LaTeX, or a number")
    return Score(None, "gold_unusable")  # compared by `MathVerifier`, many at a time


_BOOLEAN = (False, True)
# name -> (how an item is scored, options with the values that they may have)
_RULES: dict[str, tuple[Callable[[RewardItem, Options], Score], dict[str, tuple[Any, ...]]]] = {
    "maths": (_maths, {}),
    "choice": (_choice, {}),
    "text": (_text, {"metric": ("exact", "anls", "f1")}),
    "count": (_count, {"shaped": _BOOLEAN}),
    "boxes": (_boxes, {"overlap": ("giou01", "giou", "iou"), "labels": _BOOLEAN}),
    "points": (_points, {"box_centre": _BOOLEAN}),
    "span": (_span, {"strict": _BOOLEAN}),
    "gui": (_gui, {}),
}
RULES = tuple(_RULES)


class RuleReward:
    """A verifiable reward.

    Args:
      name: one of `RULES`.
      options: of the rule: ``metric`` of text, ``overlap`` and ``labels`` of boxes, and so on.
      verifier: compares mathematical answers; one is started when it is first needed.

    Raises:
      UserError: a rule or an option that does not exist.
    """

    def __init__(self, name: str, options: Options = {}, *, verifier: MathVerifier | None = None):  # noqa: B006
        if name not in _RULES:
            raise UserError(f"there is no reward {name!r}; those by rule are {', '.join(RULES)}")
        self._score, allowed = _RULES[name]
        for option, value in options.items():
            if option not in allowed:
                known = ", ".join(allowed) or "none"
                raise UserError(f"the reward {name!r} has no option {option!r}; it has {known}")
            if value not in allowed[option] or isinstance(value, bool) != (allowed[option] is _BOOLEAN):
                raise UserError(f"{option} of the reward {name!r} is {value!r}; it may be {allowed[option]}")
        self.name, self.options = name, dict(options)
        self._verifier, self._owns, self._lock = verifier, verifier is None, threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Return what decides the rewards."""
        return {"reward": self.name, "options": self.options, "version": jvlm.__version__}

    def check(self, item: RewardItem) -> None:
        """Raise UserError for a reference that the rule cannot read."""
        try:
            self._score(item, self.options)
        except _Unusable as error:
            raise UserError(
                f"item {item.id}, gold: {str(item.gold)[:100]!r} is none of {self.name!r}; {error}"
            ) from None

    def scores(self, items: Sequence[RewardItem]) -> list[Score]:
        """Return the reward of each item. A reference that cannot be read scores None."""
        found = [self._one(item) for item in items]
        if self.name == "maths":
            asked = [
                (n, item) for n, (item, score) in enumerate(zip(items, found, strict=True)) if score.parsed is None
            ]
            for opened in (False, True):
                these = [(n, item) for n, item in asked if item.thinking_opened is opened]
                pairs = [(item.answer, str(item.gold)) for _, item in these]
                scores = self._maths().scores(pairs, thinking_opened=opened) if pairs else []
                for (n, _), score in zip(these, scores, strict=True):
                    found[n] = score
        return found

    def _one(self, item: RewardItem) -> Score:
        try:
            return self._score(item, self.options)
        except _Unusable as error:
            return Score(None, "gold_unusable", str(error))

    def _maths(self) -> MathVerifier:
        with self._lock:
            if self._verifier is None:
                self._verifier = MathVerifier()
            return self._verifier

    def close(self) -> None:
        """Stop the processes that compare mathematical answers."""
        if self._owns and self._verifier is not None:
            self._verifier.close()
            self._verifier = None
