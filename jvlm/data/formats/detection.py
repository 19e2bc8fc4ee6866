"""The format of a source: decided on its first records, or named; every record of it is then converted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats.caption import CAPTION
from jvlm.data.formats.cauldron import CAULDRON
from jvlm.data.formats.document import DOCUMENT
from jvlm.data.formats.easyr1 import EASYR1
from jvlm.data.formats.example_format import AUTO, HIDDEN, Format, FormatOptions
from jvlm.data.formats.llava import LLAVA
from jvlm.data.formats.messages import MESSAGES
from jvlm.data.formats.query_response import ALPACA, QUERY_RESPONSE
from jvlm.data.formats.trl import TRL
from jvlm.data.formats.untagged import with_tags
from jvlm.data.formats.verl import VERL
from jvlm.data.values import without_nulls
from jvlm.errors import UserError

# A record that several of them match is of the first one.
FORMATS = (MESSAGES, DOCUMENT, CAPTION, CAULDRON, LLAVA, TRL, VERL, EASYR1, ALPACA, QUERY_RESPONSE)
_SHOWN = 12  # columns


@dataclasses.dataclass(frozen=True)
class Detected:
    """The format of a source.

    Attributes:
      format, options: what is converted, and how.
      reason: what it was decided on.
      sampled: records that it was decided on.
      untagged: how many of those have images without a tag, which are put before the first user text.
    """

    format: Format
    options: FormatOptions
    reason: str
    sampled: int = 0
    untagged: int = 0

    def convert(self, record: Any, origin: Origin) -> tuple[Any, int]:
        """Return a record as one of the ms-swift format or a document, and how many media were given a tag.

        What is no object is returned as it is, which `parse_example` refuses.

        Raises:
          ExampleError: a record of another format than the source's, or that cannot be converted.
        """
        if not isinstance(record, dict):
            return record, 0
        try:
            given = renamed(without_nulls(record), self.options.names(), origin)
            if not self.format.matches(given):
                other = format_of(given)
                if other is not None:
                    raise ExampleError(
                        origin,
                        "example",
                        f"of the format {other.name!r} ({other.recognised_by}) in a source of the format "
                        f"{self.format.name!r} ({self.format.recognised_by})",
                        "Give examples of each format in files of their own",
                    )
            return with_tags(self.format.convert(given, self.options, origin))
        except RecursionError as error:
            raise ExampleError(
                origin, "example", "lists or objects nested too deep", "Make the example flatter"
            ) from error

    def __str__(self) -> str:
        text = f"format {self.format.name}, {self.reason}"
        if self.untagged:
            text += f"; {self.untagged} of {self.sampled} have images without a tag: they go before the first user text"
        if self.format is EASYR1 and not self.options.answer_as_turn:
            text += "; prompts without an assistant's turn (data.answer_as_turn true makes the answer one)"
        if self.format is VERL:
            text += "; prompts without an assistant's turn, for reinforcement learning"
        return text


def format_of(record: dict[str, Any]) -> Format | None:
    """Return the first format that a record matches."""
    return next((format for format in FORMATS if format.matches(record)), None)


def renamed(record: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    """Return a record with its columns renamed, and without the hidden ones.

    Raises:
      ExampleError: two columns of one name.
    """
    if not names:
        return record
    found: dict[str, Any] = {}
    for old, value in record.items():
        new = names.get(old, old)
        if new == HIDDEN:
            continue
        if new in found:
            raise ExampleError(origin, new, "the name of two columns", f"Hide one of them: data.columns {new}=_")
        found[new] = value
    return found


def detect(first: Sequence[tuple[Origin, Any]], options: FormatOptions) -> Detected:
    """Return the format that most of the first records have.

    Args:
      first: records as they were read, or the ExampleErrors of those that could not be.

    Raises:
      UserError: an unknown name of a format; a column to rename that no record has.
    """
    names = options.names()
    records = [(origin, without_nulls(record)) for origin, record in first if isinstance(record, dict)]
    known = {name for _, record in records for name in record} | {
        name for _, record in first if isinstance(record, dict) for name in record
    }
    for old in names:
        if records and old not in known:
            raise UserError(
                f"{records[0][0].file}: data.columns renames {old!r}, which none of the first {len(records)} records "
                f"has; they have {', '.join(sorted(map(str, known))[:_SHOWN])}"
            )
    if options.format != AUTO:
        by_name = {format.name: format for format in FORMATS}
        if options.format not in by_name:
            raise UserError(f"data.format is {options.format!r}; there are {AUTO}, {', '.join(by_name)}")
        detected = Detected(by_name[options.format], options, "as given by data.format")
    else:
        found = Counter(
            format for format in (_of_sample(record, names, origin) for origin, record in records) if format
        )
        if found:
            best, count = max(found.items(), key=lambda item: (item[1], -FORMATS.index(item[0])))
            reason = f"by {count} of the first {len(records)} examples ({best.recognised_by})"
            detected = Detected(best, options, reason)
        else:
            columns = ", ".join(sorted(map(str, known))[:_SHOWN]) or "none"
            reason = f"for want of a known one in the first {len(first)} records, with the columns: {columns}"
            detected = Detected(MESSAGES, options, reason)
    return dataclasses.replace(detected, sampled=len(records), untagged=_untagged(detected, records))


def _of_sample(record: dict[str, Any], names: dict[str, str], origin: Origin) -> Format | None:
    try:
        return format_of(renamed(record, names, origin))
    except ExampleError:  # of that example, when it is read
        return None


def _untagged(detected: Detected, records: Sequence[tuple[Origin, Any]]) -> int:
    count = 0
    for origin, record in records:
        try:
            count += detected.convert(record, origin)[1] > 0
        except ExampleError:  # as above
            continue
    return count
