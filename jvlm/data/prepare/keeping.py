"""What a step of preparation leaves: kept examples as shards, the others in a list, and counts that add up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jvlm.data import stores
from jvlm.data.chosen import Chosen
from jvlm.data.conversion import write_shards
from jvlm.data.engines.engine import Engine, InProcess
from jvlm.data.errors import Rejected
from jvlm.data.example_source import ExampleSource
from jvlm.data.readers.folder import FOUND, REPORT
from jvlm.errors import UserError, file_errors

WORK = ".measured"


@dataclasses.dataclass(frozen=True)
class Found:
    """An example that a step has something to say about.

    Attributes:
      index: in its source.
      reason: why it would be dropped.
      detail: what was found, as JSON.
    """

    index: int
    reason: str
    detail: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Counts of a step.

    Attributes:
      read: examples; those dropped and those written add up to it, if any are written.
      found: examples by reason; dropped are those whose reason is in ``drop``.
      drop: reasons for which examples were dropped; empty where the step only looked.
      written: None where the step only looked.
      notes: more lines for the terminal.
    """

    read: int
    found: dict[str, int]
    drop: tuple[str, ...]
    dropped: int
    written: int | None
    shards: int
    output: str
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For the terminal."""
        lines = [*self.notes, f"{self.read:,} examples read"]
        lines += [
            f"  {count:,} {reason}{' (dropped)' if reason in self.drop or reason == 'bad' else ''}"
            for reason, count in self.found.items()
        ]
        if self.written is None:
            lines.append(f"nothing was dropped: see {Path(self.output) / FOUND}, and give --drop to write the others")
        else:
            lines.append(
                f"{self.written:,} written and {self.dropped:,} dropped: {self.shards} shard(s) under {self.output}; "
                f"what was dropped is in {Path(self.output) / FOUND}"
            )
        return "\n".join(lines)


def prepared_folder(output: str | Path) -> Path:
    """Return the folder of a step. Raises UserError for one that holds shards, or is no folder of this machine."""
    output = stores.on_disk(output, "what is found and kept is")
    if any(output.glob("*.arrayrecord")):
        raise UserError(f"{output} holds shards already; remove them or choose another folder")
    return output


def keep(
    source: ExampleSource,
    found: Iterable[Found],
    output: Path,
    *,
    identity: str,
    drop: tuple[str, ...],
    bad: dict[int, Rejected],
    first: int = 0,
    examples_per_shard: int = 10_000,
    media_root: str | None = None,
    notes: tuple[str, ...] = (),
    more: dict[str, Any] | None = None,
    engine: Engine = InProcess(),
) -> Kept:
    """List what was found, and write the examples that are not dropped, if any reason is one to drop for.

    Args:
      identity: of the source and the settings that decide.
      bad: examples that cannot be used, which are left out with any.
      first: index of the first example to be kept or dropped; those before are only compared with.
      more: for the report beside the counts.
      engine: what writes the shards.

    Raises:
      UserError: nothing is left.
    """
    keeps = np.ones(len(source), bool)
    keeps[:first] = False
    counts: Counter[str] = Counter()
    listed = (one for one in _ordered(found, bad))
    with _replaced(output / FOUND) as write:
        for one in listed:
            counts[one.reason] += 1
            dropped = one.reason in drop or one.reason == "bad"
            keeps[one.index] &= not dropped
            origin = source.read(one.index).origin
            write({"file": origin.file, "number": origin.number, "reason": one.reason, "dropped": dropped} | one.detail)
    read = len(source) - first
    dropped = int(read - keeps.sum())
    written, shards = None, 0
    if drop:
        indices = np.flatnonzero(keeps)
        if not len(indices):
            raise UserError(f"none of {read} examples is left; {output / FOUND} says why")
        chosen = hashlib.sha256(identity.encode() + indices.tobytes()).hexdigest()
        done = write_shards(
            Chosen(source, indices),
            output,
            examples_per_shard,
            identity=chosen,
            media_root=media_root,
            verb="writing",
            engine=engine,
        )
        written, shards = done.written, done.shards
        shutil.rmtree(output / WORK)
    found_counts = dict(sorted(counts.items(), key=lambda pair: -pair[1]))
    kept = Kept(read, found_counts, drop, dropped, written, shards, str(output), notes)
    with _replaced(output / REPORT) as write:
        counted = {"read": read, "found": found_counts, "drop": drop, "dropped": dropped, "written": written}
        write(counted | (more or {}))
    return kept


def _ordered(found: Iterable[Found], bad: dict[int, Rejected]) -> Iterator[Found]:
    """Yield what was found, then what cannot be used."""
    yield from found
    for index, rejected in bad.items():
        yield Found(index, "bad", {"field": rejected.field, "problem": rejected.reason, "fix": rejected.fix})


class _replaced:
    """A file of JSON lines that takes its name when the block ends; gives a function that writes a line."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(f"{path.name}.partial")

    def __enter__(self):
        with file_errors(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.part, "w", encoding="utf-8")

        def write(value: dict[str, Any]) -> None:
            with file_errors(self.path, "written"):
                self.file.write(json.dumps(value, ensure_ascii=True) + "\n")

        return write

    def __exit__(self, kind: type | None, *rest: object) -> Literal[False]:
        self.file.close()
        if kind is None:
            self.part.replace(self.path)
        else:
            self.part.unlink(missing_ok=True)
        return False
