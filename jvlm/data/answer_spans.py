"""Which characters of a rendered conversation the assistant has to write: its words and the token that ends them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jvlm.data.control_tokens import ControlTokens, any_of

# Where an answer may begin once a template has left something out: at once, and behind each tag of thinking.
_BEGINNINGS = re.compile(r"(?:\A|</?think>)\s*")


@dataclasses.dataclass(frozen=True)
class TemplateFacts:
    """What is known about a template before it is given an example.

    Attributes:
      control: the control tokens, which in a rendering only the template can have written.
      opening: what the template writes where the assistant is to begin; empty if it writes nothing.
      ends: control tokens that end an answer.
      headers: control tokens that begin a turn.
    """

    control: ControlTokens
    opening: str = ""
    ends: frozenset[str] = frozenset()
    headers: frozenset[str] = frozenset()

    def __post_init__(self):
        object.__setattr__(self, "openings", re.compile(re.escape(self.opening) or "(?!)"))
        object.__setattr__(self, "closing", re.compile(rf"\s*(?:{any_of(self.ends).pattern})"))


@dataclasses.dataclass(frozen=True)
class Span:
    """An answer's first character, the one after its last, and whether the last ones are a token that ends it."""

    begin: int
    end: int
    closed: bool


def by_opening(text: str, facts: TemplateFacts, count: int) -> list[Span] | None:
    """Return the answers, from each opening on to the token that ends it; None if that is not certain.

    It is where the opening holds a control token and stands there once for each of ``count`` answers. Then it does not
    matter what the template made of the words: trimmed them, left out thinking, wrote calls of tools.
    """
    if not facts.control.pattern.search(facts.opening):
        return None
    begins = [match.end() for match in facts.openings.finditer(text)]
    if len(begins) != count:
        return None
    ends = [_end(text, begin, limit, facts) for begin, limit in zip(begins, [*begins[1:], len(text)], strict=True)]
    if None in ends:
        return None
    return [Span(begin, end, True) for begin, end in zip(begins, ends, strict=True)]


def _end(text: str, begin: int, limit: int, facts: TemplateFacts) -> int | None:
    last = None
    for match in facts.control.pattern.finditer(text, begin, limit):
        if match[0] in facts.headers:
            return last
        last = match.end()
        if match[0] in facts.ends:
            return last
    return None


def mark(words: str, begin: str, end: str, *, tight: bool = False) -> str:
    """Return an answer with a character wherever its rendered words may begin, and one where they end.

    They stand inside of outer white space, so templates that trim an answer keep them. ``tight`` leaves out the white
    space in front of the beginnings.
    """
    if tight:
        words = _BEGINNINGS.sub(lambda match: match[0].rstrip(), words)
    last = len(words.rstrip())
    cuts = sorted({min(match.end(), last) for match in _BEGINNINGS.finditer(words)})
    pieces = [words[a:b] for a, b in zip([0, *cuts], [*cuts, last], strict=True)]
    return begin.join(pieces) + end + words[last:]


def read_marks(rendered: str, marks: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int] | None]]:
    """Return (a rendering without its marks, first and end character of each answer); None if words are gone."""
    numbers = {character: n for n, pair in enumerate(marks) for character in pair}
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    pieces, at = re.split(f"([{re.escape(''.join(numbers))}])", rendered), 0
    for piece, character in zip(pieces[::2], pieces[1::2], strict=False):
        at += len(piece)
        number = numbers[character]
        if character == marks[number][1]:
            ends[number] = at
        else:
            begins.setdefault(number, at)
    spans = [(begins[n], ends[n]) if n in ends and begins.get(n, at) <= ends[n] else None for n in range(len(marks))]
    return "".join(pieces[::2]), spans


def from_marks(text: str, begin: int, end: int, space: int, facts: TemplateFacts) -> Span:
    """Return an answer of which ``space`` white space characters stand in front of its first word."""
    begin -= space
    # and the space that the model has to write first, where a prompt ends without it
    opened = text.rfind(facts.opening, 0, begin) + len(facts.opening)
    if facts.opening and text[opened:begin].isspace():
        begin = opened
    closing = facts.closing.match(text, end)
    return Span(begin, closing.end() if closing else end, closing is not None)


def space_before(text: str, begin: int) -> int:
    """How many white space characters stand in front of a position."""
    return begin - len(text[:begin].rstrip())


def by_prefix(text: str, before: str, after: str, facts: TemplateFacts) -> Span | None:
    """Return an answer from the renderings of what precedes it and of what ends with it; None if they differ there."""
    if not (after.startswith(before) and text.startswith(after)):
        return None
    begin = len(before)
    if text.startswith(facts.opening, begin):
        begin += len(facts.opening)
    *_, last = (None, *facts.control.pattern.finditer(text, begin, len(after)))
    if last is None or text[last.end() : len(after)].strip():
        return Span(begin, len(after.rstrip()), False)
    return Span(begin, last.end(), True)
