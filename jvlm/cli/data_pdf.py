"""``jvlm data pdf``: pages of PDF files as examples."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tyro.conf import Positional

from jvlm.cli.data_prepare import Made
from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPdf(Made):
    """Write pages of PDF files as shards of images with their text.

    Attributes:
      files: PDF files, or globs of them.
      pages: numbers and ranges from 1, as 1-5 8 10-; all without it.
      dpi: pixels an inch.
      max_side: longest side of a page in pixels; larger ones are drawn smaller.
      unit: what has a box.
      task: read asks for all text, read_boxes for each line or word with its box, locate for the box of one;
        document is the image and its text, without turns.
      seed: for what locate asks.
      degrade: share of the pages that are turned a little, blurred, noisy or compressed, each with its boxes.
      seconds: a page may take before its process is killed.
      memory_gb: a process may have.
    """

    files: Positional[tuple[str, ...]] = ()
    pages: tuple[str, ...] = ()
    dpi: float = 144.0
    max_side: int = 4096
    unit: Literal["line", "word"] = "line"
    task: Literal["read", "read_boxes", "locate", "document"] = "read"
    seed: int = 0
    degrade: float = 0.0
    seconds: float = 30.0
    memory_gb: float = 4.0


def run(words: list[str]) -> int:
    options = parse(DataPdf, words, "jvlm data pdf")
    if not options.files:
        raise UserError("jvlm data pdf: no files; give PDF files, or globs of them")

    from jvlm.data.prepare.pdf import PdfPages, PdfSettings

    with PdfPages(options.files, options.settings(PdfSettings)) as pages:
        done = options.write(pages, "reading pages")
    print(done.text())
    return 0
