"""Mathematical answers, compared by Math-Verify in processes that are killed when they take too long.

Math-Verify alone accepts what restates a question, anagrams of words, other units and answers out of the thinking; what
is refused before it is asked is in `refused`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import re
import unicodedata
from collections.abc import Sequence

from jvlm.killable_pool import KillablePool
from jvlm.scoring import math_worker
from jvlm.scoring.answers import answer
from jvlm.scoring.extras import require
from jvlm.scoring.score import Score
from jvlm.scoring.words import words
from jvlm.units import GIB

LONGEST = 300  # characters of an answer; longer ones are no results
_TASKS = 100  # of a process, after which it is replaced: sympy's caches grow


class MathVerifier(KillablePool):
    """Compares answers with references, many at a time. Use it as a context manager, or call `close`.

    Args:
      workers: processes. A comparison that takes too long holds up one of them.
      seconds: time for one comparison, after which its process is killed and another started.
      memory: address space of a process in bytes.

    Raises:
      UserError: Math-Verify is not installed.
    """

    def __init__(self, workers: int = 2, *, seconds: float = 5.0, memory: int = 2 * GIB):
        require("math_verify")
        self.seconds = seconds
        super().__init__(require("pebble"), workers, _TASKS, math_worker.begin, (memory,))
        self._equal = functools.lru_cache(100_000)(self._schedule)

    def __call__(self, text: str, gold: str, *, thinking_opened: bool = False) -> Score:
        """Return the score of one answer."""
        return self.scores([(text, gold)], thinking_opened=thinking_opened)[0]

    def scores(self, pairs: Sequence[tuple[str, str]], *, thinking_opened: bool = False) -> list[Score]:
        """Return the score of each (answer, reference): 1 if both are equal.

        A reference in words is compared as words. One that cannot be read scores None, "gold_unusable".
        """
        begun = [self._begin(text, gold, thinking_opened) for text, gold in pairs]
        return [item if isinstance(item, Score) else _score(*item) for item in begun]

    def _begin(self, text: str, gold: str, thinking_opened: bool) -> Score | tuple[concurrent.futures.Future, str]:
        if is_words(gold):
            return words(text, [gold], thinking_opened=thinking_opened)
        content = answer(text, thinking_opened=thinking_opened)
        if isinstance(content, Score):
            return content
        content, gold = cleaned(expression(content)), cleaned(gold)
        reason = refused(content, gold)
        if reason is not None:
            return Score(0.0, reason, content[:LONGEST])
        return self._equal(gold, content), content

    def _schedule(self, gold: str, content: str) -> concurrent.futures.Future:
        return self._pool.schedule(math_worker.equal, args=(gold, content), timeout=self.seconds)


def _score(future: concurrent.futures.Future, content: str) -> Score:
    try:
        equal = future.result()
    except (concurrent.futures.TimeoutError, require("pebble").ProcessExpired, MemoryError, RecursionError):
        return Score(0.0, "timeout", content)
    return Score(None, "gold_unusable", content) if equal is None else Score.of(equal, content)


def is_words(gold: str) -> bool:
    """Return whether a reference is a word or letters, which Math-Verify would multiply with one another."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", gold).strip().strip(".")
    return re.fullmatch(r"[^\W\d_]+(?:[\s-]+[^\W\d_]+)*", bare) is not None


def expression(content: str) -> str:
    """Return the expression of an answer without a box: its last formula, or what follows the last "is", ":", "="."""
    if re.search(r"(?<![\\\w{])[a-z]{3,}\s", content, re.IGNORECASE) is None:
        return content
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", content, re.DOTALL)
    if formulas:
        return next(filter(None, formulas[-1])).rpartition("=")[2]
    return re.split(r"\bis\b|:|=", content)[-1]


def cleaned(text: str) -> str:
    """Return an expression without outer dollars and a closing full stop, in plain characters."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip()
    return text.strip("$").strip().removesuffix(".").strip()


# What an answer may not hold unless the reference does: it restates the question instead of answering it.
_RESTATING = (
    r"\\i?int\b",
    r"\\sum\b",
    r"\\prod\b",
    r"\\lim\b",
    r"\\frac\{d\}",
    r"!",
    r"\\pm\b",
    r"\\sqrt\b",
    r"\\binom\b",
)
_PLAIN = r"-?\d[\d.,]*"
_SUM = re.compile(rf"(?<![\d^_({{]){_PLAIN}\s*[+-]\s*{_PLAIN}(?![\d\\a-zA-Z])")
_UNIT = re.compile(r"\\(?:text|mathrm|rm)\s*\{\s*([^{}]*?)\s*\}|(?<=\d)\s*(mm|cm|dm|km|m|mg|kg|g|ml|l|s|min|h)\b")
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def refused(content: str, gold: str) -> str | None:
    """Return why an answer is not even compared; None if it is to be."""
    if not content:
        return "unparsed"
    if len(content) > LONGEST or "\\boxed" in content:
        return "unparsed"
    if any(re.search(form, content) and not re.search(form, gold) for form in _RESTATING):
        return "wrong"
    if _SUM.search(content) and not _SUM.search(gold):
        return "wrong"
    if _other_unit(content, gold) or _other_brackets(content, gold) or _variables(content) > _variables(gold):
        return "wrong"
    sides = content.split("=")
    if len(sides) > 1 and "=" not in gold and not any(_variables(side) for side in sides[:-1]):
        return "wrong"
    return None


def _other_unit(content: str, gold: str) -> bool:
    """Whether both name a unit, and not the same."""
    units = [{(a or b).casefold() for a, b in _UNIT.findall(text)} - {"", "or", "and"} for text in (content, gold)]
    return bool(units[0]) and bool(units[1]) and units[0] != units[1]


def _other_brackets(content: str, gold: str) -> bool:
    """Whether the reference is a pair or an interval, and the answer is not in the same brackets."""
    pair = re.fullmatch(r"(?:\\left)?([(\[]).*,.*?(?:\\right)?([)\]])", gold)
    if pair is None:
        return False
    other = re.fullmatch(r"(?:\w+\s*(?:=|\\in)\s*)?(?:\\left)?([(\[]).*,.*?(?:\\right)?([)\]])", content)
    return other is None or other.groups() != pair.groups()


def _variables(text: str) -> set[str]:
    """Letters that stand for something; the side of an equation that names the result does not count."""
    text = _COMMAND.sub(" ", _UNIT.sub(" ", re.sub(r"^\s*[a-zA-Z](?:_\w+)?\s*(?:=|\\in)", "", text)))
    return set(re.findall(r"[a-zA-Z]", text)) - {"e", "i"}
