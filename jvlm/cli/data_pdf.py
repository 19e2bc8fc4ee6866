"""``jvlm data pdf``: pages of PDF files as examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPdf:
    """Write pages of PDF files as shards of images with their text.

    Attributes:
      files: PDF files, or globs of them.
      output: folder to write; the same command goes on with an interrupted one.
      pages: numbers and ranges from 1, as 1-5 8 10-; all without it.
      dpi: pixels an inch.
      max_side: longest side of a page in pixels; larger ones are drawn smaller.
      unit: what has a box.
      task: read asks for all text, read_boxes for each line or word with its box, locate for the box of one;
        document is the image and its text, without turns.
      seed: for what locate asks.
      seconds: a page may take before its process is killed.
      memory_gb: a process may have.
      examples_per_shard: examples in a file.
      on_bad_example: stop at a page that cannot be read, or leave it out; what is left out is counted.
      rejected: JSONL file to write every page to that is left out.
    """

    files: Positional[tuple[str, ...]] = ()
    output: Path
    pages: tuple[str, ...] = ()
    dpi: float = 144.0
    max_side: int = 4096
    unit: Literal["line", "word"] = "line"
    task: Literal["read", "read_boxes", "locate", "document"] = "read"
    seed: int = 0
    seconds: float = 30.0
    memory_gb: float = 4.0
    examples_per_shard: int = 1000
    on_bad_example: Literal["error", "skip"] = "error"
    rejected: str | None = None


def run(words: list[str]) -> int:
    options = parse(DataPdf, words, "jvlm data pdf")
    if not options.files:
        raise UserError("jvlm data pdf: no files; give PDF files, or globs of them")

    from jvlm.data.conversion import write_shards
    from jvlm.data.prepare.pdf import PdfPages, PdfSettings
    from jvlm.data.rejections import writing

    settings = PdfSettings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(PdfSettings)})
    with PdfPages(options.files, settings) as pages, writing(options.rejected, ()) as on_rejected:
        done = write_shards(
            pages,
            options.output,
            options.examples_per_shard,
            identity=pages.identity(),
            on_bad_example=options.on_bad_example,
            on_rejected=on_rejected,
            verb="reading pages",
        )
    print(done.text())
    return 0
