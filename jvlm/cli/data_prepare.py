"""Options that the commands of preparing data share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from jvlm.errors import UserError

if TYPE_CHECKING:
    from jvlm.data.formats.example_format import FormatOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Examples that are read, and the folder for what is found and kept.

    Attributes:
      files: data files of any kind that is read, globs of them, folders of datasets, or datasets on the Hub.
      output: folder for found.jsonl, report.json and the shards. The same command goes on where it was interrupted.
      format: format of the examples; "auto" decides for each file or glob, on its first 100 examples.
      columns: FROM=TO gives a column another name, FROM=_ hides it.
      media_root: folder for relative image paths, after the data file's own.
      on_bad_example: stop at an example that cannot be used, or leave it out; what is left out is counted and listed.
      examples_per_shard: examples in a file.
      threads: that read and decode images.
    """

    files: Positional[tuple[str, ...]] = ()
    output: Path
    format: str = "auto"
    columns: tuple[str, ...] = ()
    media_root: str | None = None
    on_bad_example: Literal["error", "skip"] = "error"
    examples_per_shard: int = 10_000
    threads: int = 4

    def __post_init__(self):
        if not self.files:
            raise UserError("no files; give data files, or globs of them")
        if self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")

    def options(self) -> FormatOptions:
        """Return the format of the examples."""
        from jvlm.data.formats.example_format import FormatOptions

        return FormatOptions(self.format, self.columns)

    def shared(self) -> dict:
        """Return the arguments that every step takes."""
        return {
            "options": self.options(),
            "media_root": self.media_root,
            "on_bad_example": self.on_bad_example,
            "examples_per_shard": self.examples_per_shard,
            "threads": self.threads,
        }
