"""Shards as a set: names that number them, and a mark in each that says which set it is of.

A set is complete when every number of ``NAME-00000-of-00003`` is in its folder. ArrayRecord files have no metadata of a
user's own and a file beside them does not survive a copy of ``*.arrayrecord``, so `Mark` travels in the first record.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

# the key of the first record, which readers take away again
MARK = "jvlm_shard"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>[^.]*)(?P<suffix>\.\w+)")
# what file managers and browsers add to the name of a second copy
_COPY = re.compile(r"[ _-]*(\(\d+\)|copy\b.*)", re.IGNORECASE)
_ALONE = "Copy the whole set, write it again, or rename the files to read them without the rest"


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a shard says about itself.

    Attributes:
      set: the same in all shards of a set, and in no other.
      number, count: which shard this is, from 0, and how many there are.
      records: how many this shard has.
    """

    set: str
    number: int
    count: int
    records: int

    @classmethod
    def of(cls, example: Any) -> Mark | None:
        """Return the mark of a shard's first example; None if it has none, or one that this version cannot read."""
        values = example.get(MARK) if isinstance(example, dict) else None
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**values) if isinstance(values, dict) and set(values) == names else None


def shard_name(stem: str, number: int, count: int, suffix: str) -> str:
    """``stem-00000-of-00003.suffix``."""
    return f"{stem}-{number:05d}-of-{count:05d}{suffix}"


def problems_of_names(folder: epath.Path, chosen: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return what is wrong with the sets that files belong to, going by their names: one line each.

    Args:
      chosen: names of the files to be read. A part of a set may be chosen on purpose, so a number is missing only if
        its file is not in the folder either.
      present: names of all files of the folder.
    """
    problems = []
    sets: dict[tuple[str, str], dict[int, dict[int, list[str]]]] = defaultdict(lambda: defaultdict(dict))
    for name in chosen:
        match = _NUMBERED.fullmatch(name)
        if match and _COPY.fullmatch(match["rest"]):
            problems.append(
                f"{folder / name}: a second copy of a shard, by its name. Remove it, or give it another name"
            )
        elif match and not match["rest"]:
            numbers = sets[match["stem"], match["suffix"]][int(match["count"])]
            numbers.setdefault(int(match["number"]), []).append(name)
    there: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for match in filter(None, map(_NUMBERED.fullmatch, present)):
        if not match["rest"]:
            there[match["stem"], match["suffix"], int(match["count"])].add(int(match["number"]))
    for (stem, suffix), counts in sets.items():
        if len(counts) > 1:
            examples = " and ".join(numbers[min(numbers)][0] for _, numbers in sorted(counts.items())[:2])
            problems.append(f"{folder}: shards of different sets, {examples}. Move one set to another folder")
        for count, numbers in counts.items():
            problems += _problems_of_set(folder, (stem, suffix, count), numbers, there[stem, suffix, count])
    return problems


def _problems_of_set(
    folder: epath.Path, key: tuple[str, str, int], chosen: dict[int, list[str]], there: set[int]
) -> list[str]:
    stem, suffix, count = key
    problems = [
        f"{folder}: {' and '.join(sorted(names))} have the same number. Remove all but one"
        for names in chosen.values()
        if len(names) > 1
    ]
    first = 1 if count in there and 0 not in there else 0  # some tools count from 1
    numbers = range(first, first + count)
    outside = min((number for number in chosen if number not in numbers), default=None)
    if outside is not None:
        name = chosen[outside][0]
        problems.append(
            f"{folder / name}: a set of {count} is numbered {first} to {first + count - 1}. Rename the file"
        )
    missing = next((number for number in numbers if number not in there), None)
    if missing is not None:
        lacking = count - sum(number in numbers for number in there)
        name = shard_name(stem, missing, count, suffix)
        problems.append(f"{folder / name}: missing; {lacking} of the {count} files of this set are. {_ALONE}")
    return problems


def problems_of_marks(shards: Sequence[tuple[str, int, Mark]]) -> list[str]:
    """Return what is wrong with shards, each (path, records, mark), going by their marks: one line each."""
    problems = []
    first: dict[tuple[str, int], str] = {}
    sets: dict[tuple[Path, str, str], tuple[str, str]] = {}
    for path, records, mark in shards:
        if records != mark.records:
            problems.append(f"{path}: {records} records, but it was written with {mark.records}. Write the set again")
        if (mark.set, mark.number) in first:
            problems.append(f"{path}: a copy of {first[mark.set, mark.number]}. Remove one of them")
            continue
        first[mark.set, mark.number] = path
        match = _NUMBERED.fullmatch(Path(path).name)
        if not match or match["rest"]:
            continue
        if (int(match["number"]), int(match["count"])) != (mark.number, mark.count):
            problems.append(
                f"{path}: number {int(match['number'])} of {int(match['count'])} by its name, but written as number "
                f"{mark.number} of {mark.count}. Give it the name it was written with"
            )
        known, other = sets.setdefault((Path(path).parent, match["stem"], match["count"]), (mark.set, path))
        if known != mark.set:
            problems.append(f"{path}: of another set than {other}. {_ALONE}")
    return problems
