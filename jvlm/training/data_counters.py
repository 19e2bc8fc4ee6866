"""What a run has read of its data: conversations used, and those left out, counted, listed and limited."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jvlm.data.config import DataConfig
from jvlm.data.packing import PackedSequences
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.side_files import read_lines, write_lines

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

REJECTED = "rejected.jsonl"
_COUNTS = ("conversations", "parts", "bad", "too_long", "skipped", "part")
_ENOUGH = 100  # examples read before a share of them says something


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts of all processes. An example counts once in each pass over the data.

    Attributes:
      conversations: used.
      parts: packed that are parts of documents that were cut.
      bad, too_long, skipped: examples left out, by kind.
      part: parts of documents left out of which others are used.
      examples: of the data.
      before: passes over data that were exchanged for these.
      by_source: (examples read, examples left out) of each source of a mixture.
    """

    conversations: int
    parts: int
    bad: int
    too_long: int
    skipped: int
    part: int
    examples: int
    before: float
    by_source: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def read(self) -> int:
        """Examples, those left out included."""
        return self.conversations + self.bad + self.too_long + self.skipped

    @property
    def dropped(self) -> float:
        """Share of the examples read that was bad or did not fit."""
        return (self.bad + self.too_long) / max(self.read, 1)

    @property
    def epoch(self) -> float:
        """Passes over the data."""
        return self.before + self.read / self.examples


class DataCounters(Hook):
    """Counts what this process reads, and lists each example that it leaves out once in rejected.jsonl.

    Args:
      examples: of one pass over the data.
      counts: whether this process counts; another may read the same.
      sources: examples of each source of a mixture; empty where there is none.
    """

    def __init__(
        self, folder: Path, examples: int, config: DataConfig, *, counts: bool, sources: Mapping[str, int] = {}
    ):
        self.path, self.examples, self.config = folder / _name(jax.process_index()), examples, config
        self.counts, self.before, self.sources = counts, 0.0, dict(sources)
        self._count = dict.fromkeys(_COUNTS, 0)
        self._read: Counter[str] = Counter()  # examples of each source, those left out included
        self._left_out: Counter[str] = Counter()
        self._listed: set[tuple[str, int]] = set()
        self._unchecked: Totals | None = None

    def on_batch(self, trainer: Trainer, packed: Sequence[PackedSequences]) -> None:
        for one in packed:
            self.add(one, trainer.step + 1)

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        self._unchecked = totals = self.totals()
        values = {"epoch": round(totals.epoch, 3), "dropped": totals.dropped}
        for name, examples in self.sources.items():
            read, left_out = totals.by_source[name]
            values |= {f"epoch/{name}": round(read / examples, 4), f"rejected/{name}": float(left_out)}
        return values

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        # after the log line, which says what was left out
        totals, self._unchecked = self._unchecked, None
        if totals is not None:
            self.check(totals)

    def add(self, packed: PackedSequences, step: int) -> None:
        """Count what came with a step's batch."""
        if not self.counts:
            return
        self._count["conversations"] += packed.conversations
        self._count["parts"] += packed.parts
        self._read.update(packed.by_source)
        for example in packed.rejected:
            self._count[example.kind] += 1
            if example.kind != "part":
                self._read[example.source] += 1
                self._left_out[example.source] += 1
        new = {
            (example.file, example.number): example
            for example in packed.rejected
            if (example.file, example.number) not in self._listed
        }
        if new:
            self._listed |= set(new)
            with open(self.path, "a") as file:
                file.writelines(
                    json.dumps({**dataclasses.asdict(example), "step": step}) + "\n" for example in new.values()
                )

    def totals(self) -> Totals:
        """Of all processes; each must ask."""
        return self._sum(self.state())

    def check(self, totals: Totals) -> None:
        """Raise UserError, on all processes alike, where more was left out than the configuration allows."""
        bad, too_long = self.config.max_bad_fraction, self.config.max_too_long_fraction
        if totals.read < _ENOUGH:
            return
        for what, count, name, limit in (
            ("were bad", totals.bad, "max_bad_fraction", bad),
            ("did not fit", totals.too_long, "max_too_long_fraction", too_long),
        ):
            if count > limit * totals.read:
                raise UserError(
                    f"{count} of {totals.read} examples read {what} and were left out, more than data.{name} = "
                    f"{limit}; they are listed in {self.path} with reasons. Fix them, or raise data.{name}"
                )

    def state(self) -> list[dict[str, Any]]:
        """Of every process, for a checkpoint; each must ask."""
        by_source = {name: [self._read[name], self._left_out[name]] for name in self.sources}
        own = {**self._count, "examples": self.examples, "before": self.before, "by_source": by_source}
        return hosts.all_gather_object(own)

    def restore(self, state: list[Mapping[str, Any]], step: int) -> None:
        """Go on from a process's share of what all had read, and forget examples listed after ``step``.

        Where the data has another number of examples than before, counting begins anew and earlier passes still count.
        """
        index, count = jax.process_index(), jax.process_count()
        totals = self._sum(state)
        self.before = totals.before
        if totals.examples != self.examples:
            self.before, totals = totals.epoch, dataclasses.replace(totals, **dict.fromkeys(_COUNTS, 0))
        for name in _COUNTS:
            total = getattr(totals, name)
            self._count[name] = total // count + (index < total % count)
        if index == 0:
            for name in self.sources.keys() & totals.by_source.keys():
                self._read[name], self._left_out[name] = totals.by_source[name]
        others = [p for p in self.path.parent.glob(f"*.{REJECTED}") if _number(p) >= count] if hosts.is_rank0() else []
        for path in (self.path, *others):
            if path.is_file():
                lines = [line for line in read_lines(path) if line["step"] <= step]
                write_lines(path, lines)
                self._listed |= {(line["file"], line["number"]) for line in lines if path == self.path}

    def rejected(self) -> int:
        """Different examples left out so far, by all processes; each must ask."""
        return len({(file, number) for file, number in hosts.all_gather_concat(sorted(self._listed))})

    def summary(self, rejected: int) -> str:
        """Return what was read, by all processes; each must ask."""
        totals = self.totals()
        where = f" (listed in {self.path})" if rejected else ""
        cut = f" ({totals.parts} parts of documents that were cut)" if totals.parts else ""
        read = f"{totals.conversations} conversations{cut} = {totals.epoch:.2f} epochs"
        return f"{read}, {rejected} examples left out{where}"

    def _sum(self, states: list[Mapping[str, Any]]) -> Totals:
        counts = {name: sum(state[name] for state in states) for name in _COUNTS}
        by_source = {
            name: tuple(map(sum, zip(*(state["by_source"][name] for state in states), strict=True)))
            for name in states[0]["by_source"]
        }
        return Totals(**counts, examples=states[0]["examples"], before=states[0]["before"], by_source=by_source)


def _name(process: int) -> str:
    return f"{process}.{REJECTED}" if process else REJECTED


def _number(path: Path) -> int:
    first = path.name.partition(".")[0]
    return int(first) if first.isdigit() else -1
