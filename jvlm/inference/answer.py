"""One answer on the host: its text, and where it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from jvlm.data.processor import Processor
from jvlm.inference.requests import FinishReason, Request
from jvlm.inference.text import TextStream


class StopTexts:
    """Ends a text where one of some texts appears in it, and holds back what may be the beginning of one.

    Args:
      include: leave the text that ended it in.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self.stops, self.include = tuple(stops), include
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """Return what of the text so far can be given, and the stop that ended it. The first to end is the one."""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            self._held = ""
            return text[: end if self.include else at], stop
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


@dataclasses.dataclass(frozen=True)
class Step:
    """What a token did to an answer."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def behind(self, first: Step, finish_reason: FinishReason | None = None) -> Step:
        """Return the step that does what another did and then this one, perhaps for another reason."""
        return Step(first.text + self.text, finish_reason or self.finish_reason, self.stop_reason)


class Answer:
    """The tokens and the text of one of a request's answers.

    Args:
      ends: tokens that end it.
      limit: most tokens.

    Attributes:
      tokens: so far.
      ended: whether no further token counts.
    """

    def __init__(self, request: Request, processor: Processor, ends: Collection[int], limit: int):
        sampling = request.sampling
        self.ends, self.limit, self.least = ends, limit, sampling.min_tokens
        self._own_ends = sampling.stop_token_ids is not None
        self._text = TextStream(processor, special=not sampling.skip_special_tokens) if sampling.detokenize else None
        self._stops = StopTexts(sampling.stop, sampling.include_stop) if sampling.stop else None
        self._streams = sampling.stream or self._stops is not None
        self.tokens: list[int] = []
        self.ended = False

    def finish(self) -> Step:
        """End the answer: nothing may follow its last token."""
        return self._end("", "stop")

    def extend(self, tokens: Sequence[int]) -> tuple[int, Step]:
        """Take the next tokens. Returns how many count, up to the one that ends the answer, and what they did."""
        if self._stops is None:
            return self._extend(tokens)
        text, count = "", 0
        while not self.ended and count < len(tokens):
            _, step = self._extend(tokens[count : count + 1])
            text, count = text + step.text, count + 1
        return count, dataclasses.replace(step, text=text)

    def _extend(self, tokens: Sequence[int]) -> tuple[int, Step]:
        tokens = tokens[: self.limit - len(self.tokens)]
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None) if self.ends else None
        plain = tokens if end is None else tokens[:end]
        self.tokens += plain
        text, stop = "", None
        if self._text is not None:
            text = self._text.extend(plain) if self._streams else self._text.hold(plain)
        if self._stops is not None and plain and len(self.tokens) >= self.least:
            text, stop = self._stops.add(text)
        if stop is not None:
            self.ended = True
            return len(plain), Step(text, "stop", stop)
        if end is not None:
            self.tokens.append(tokens[end])
            return end + 1, self._end(text, "stop", tokens[end] if self._own_ends else None)
        if len(self.tokens) < self.limit:
            return len(plain), Step(text)
        return len(plain), self._end(text, "length")

    def _end(self, text: str, finish_reason: FinishReason, stop_reason: int | None = None) -> Step:
        """Return the last step, after some text that can be given; a stop text may stand in what was held back."""
        self.ended = True
        rest = "" if self._text is None else self._text.finish()
        if self._stops is None:
            return Step(text + rest, finish_reason, stop_reason)
        rest, stop = self._stops.add(rest)
        if stop is not None:
            return Step(text + rest, "stop", stop)
        return Step(text + rest + self._stops.finish(), finish_reason, stop_reason)
