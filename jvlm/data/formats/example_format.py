"""What a format is, and the settings that conversions have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jvlm.data.config import DataConfig
from jvlm.data.errors import Origin
from jvlm.errors import UserError

AUTO = "auto"
HIDDEN = "_"


@dataclasses.dataclass(frozen=True)
class FormatOptions:
    """What the records of a source are, and what becomes of them. The fields of `DataConfig` of these names.

    Attributes:
      format: name of a format; "auto" decides on the first 100 records of each source.
      columns: "FROM=TO" gives a column another name before anything else is done; "FROM=_" hides it.
      caption_prompt: the user's text before a caption; None makes a document of image and caption.
      answer_as_turn: whether the answer of an EasyR1 record is an assistant's turn as well.
    """

    format: str = AUTO
    columns: tuple[str, ...] = ()
    caption_prompt: str | None = None
    answer_as_turn: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> FormatOptions:
        """Return the options that a configuration of the data holds."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def names(self) -> dict[str, str]:
        """Return old name -> new name of the columns. Raises UserError for an entry that is no pair of names."""
        pairs = [entry.partition("=") for entry in self.columns]
        for entry, (old, _, new) in zip(self.columns, pairs, strict=True):
            if not old or not new:
                raise UserError(f"data.columns: {entry!r} is not FROM=TO; FROM=_ hides a column")
        names = {old: new for old, _, new in pairs}
        given = [new for new in names.values() if new != HIDDEN]
        if len(names) < len(pairs) or len(set(given)) < len(given):
            raise UserError(f"data.columns: {', '.join(self.columns)}: a name stands on one side twice")
        return names


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
      name: as in `DataConfig.format`.
      recognised_by: the fields that a record of it has, for people.
      matches: whether a record is of this format, by its fields.
      convert: a record as one of the ms-swift format, or a document; fields that it does not use are carried along.
        Raises ExampleError for every record that cannot be converted, whatever is in it.
    """

    name: str
    recognised_by: str
    matches: Callable[[dict[str, Any]], bool]
    convert: Callable[[dict[str, Any], FormatOptions, Origin], dict[str, Any]]
