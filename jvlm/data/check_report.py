"""What a check of the data found, as numbers and as text for the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError
from jvlm.data.rejections import Rejections

_COLUMNS = 20


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a check found. Sizes are of the examples that could be encoded, those too long for a sequence included.

    Attributes:
      examples: read; each is either usable or rejected.
      rejected: one error for each example that training would reject; empty where ``on_rejected`` took them.
      faults: the same, grouped and counted.
      config: what was checked against, with every size known.
      encoded: whether a processor encoded the examples; without one, sizes were not checked.
      tokens, media_tokens, patches: of each example; empty without a processor.
      images: of each example, frames included.
      loss_tokens: tokens with a loss, of all examples.
      changed: examples that ``on_too_long`` truncates or shrinks.
      documents: examples without turns.
      cut, parts: documents that were cut, and into how many parts that are used.
      parts_left_out: parts of documents of which others are used.
      columns: what there is to say about unknown columns, one line each.
      suggestion: sizes of packed sequences that suit the data; empty without a processor.
      formats: what the examples of each file or glob were taken for, one line each.
      untagged: examples with images without a tag, which go before the first user text.
      held_out: what the examples share with each held-out set, one line each.
    """

    examples: int
    rejected: tuple[ExampleError, ...]
    faults: Rejections
    config: DataConfig
    encoded: bool
    tokens: Sequence[int]
    media_tokens: Sequence[int]
    images: Sequence[int]
    patches: Sequence[int]
    loss_tokens: int
    changed: int
    documents: int
    cut: int
    parts: int
    parts_left_out: Rejections
    columns: tuple[str, ...]
    suggestion: str
    formats: tuple[str, ...] = ()
    untagged: int = 0
    held_out: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Examples that training would learn from."""
        return self.examples - self.faults.count()

    def text(self) -> str:
        """For the terminal: what can be used, what is wrong, and what the examples are like."""
        lines = [f"{self.usable} of {self.examples} examples can be used", *self.formats]
        if self.untagged:
            lines.append(f"{self.untagged} examples have images without a tag: they go before the first user text")
        lines += [*self._consequences(), *self.faults.lines()]
        lines += self.columns[:_COLUMNS]
        if self.columns[_COLUMNS:]:
            lines.append(f"and {len(self.columns) - _COLUMNS} more lines about columns that are not used")
        lines += [*self._sizes(), *self.held_out]
        return "\n".join(lines)

    def _consequences(self) -> Iterator[str]:
        """Yield what training would do about the examples that are rejected or changed."""
        config, bad, too_long = self.config, self.faults.count("bad"), self.faults.count("too_long")
        if bad and config.on_bad_example == "error":
            yield f"{bad} bad: training stops at the first one (data.on_bad_example error)"
        elif bad:
            yield f"{bad} bad: left out (data.on_bad_example skip)" + self._above("max_bad_fraction", bad)
        if self.faults.count("skipped"):
            yield f"{self.faults.count('skipped')} skipped: left out by the rules of data.documents"
        if too_long and config.on_too_long == "error":
            yield f"{too_long} too long: training stops at the first one (data.on_too_long error)"
        elif too_long:
            how = f"{too_long} too long: left out (data.on_too_long {config.on_too_long})"
            yield how + self._above("max_too_long_fraction", too_long)
        if self.changed:
            how = "have their images shrunk" if config.on_too_long == "shrink" else "lose turns at their end"
            yield f"{self.changed} too long: {how} (data.on_too_long {config.on_too_long})"
        if self.documents:
            yield f"{self.documents} documents, {self.cut} of them cut into {self.parts} parts"
        if self.parts_left_out.count():
            yield f"{self.parts_left_out.count()} further parts left out:"
            yield from self.parts_left_out.lines()

    def _above(self, limit: str, count: int) -> str:
        most = getattr(self.config, limit)
        return f"; more than data.{limit} {most}, so training stops" if count > most * self.examples else ""

    def _sizes(self) -> Iterator[str]:
        named = {
            "tokens": self.tokens,
            "vision tokens": self.media_tokens,
            "images": self.images,
            "patches": self.patches,
        }
        named = {name: values for name, values in named.items() if any(values)}
        if named:
            yield f"{'of an example':<14}{'min':>10}{'median':>10}{'95 %':>10}{'max':>10}{'in all':>16}"
        for name, values in named.items():
            marks = np.percentile(values, (0, 50, 95, 100), method="higher")
            yield f"{name:<14}" + "".join(f"{int(mark):>10,}" for mark in marks) + f"{sum(values):>16,}"
        if len(self.tokens):
            yield f"loss tokens: {100 * self.loss_tokens / sum(self.tokens):.1f} % of the tokens"
        if self.suggestion:
            yield self.suggestion
        elif not self.encoded:
            yield "without --model or --config: tokens, image limits and the sizes of a sequence were not checked"
