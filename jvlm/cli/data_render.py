"""``jvlm data render``: images drawn with known text, as examples."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tyro.conf import Positional

from jvlm.cli.data_prepare import Made
from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRender(Made):
    """Draw examples for reading and finding: text, formulas, code, tables, web pages. The same seed gives the same.

    Attributes:
      kind: text draws paragraphs of text files; columns pages of two or three columns of them; formula lines of files,
        as LaTeX; code parts of files of code; table parts of CSV files; page HTML files, with headless Chromium.
      files: inputs, or globs of them; they come in turn, each time drawn otherwise.
      count: examples.
      seed: for all that is drawn.
      task: read asks for all text, read_boxes for each part with its box, locate for the box of one, act for a click on
        an element of a page or words typed into it; document is the image and its text, without turns.
      degrade: share of the examples that are turned a little, blurred, noisy or compressed, each with its boxes.
      fonts: font files, or globs of them; DejaVu's without it.
      browser: Chromium's file; without it one is looked for on the path.
    """

    kind: Positional[Literal["text", "columns", "formula", "code", "table", "page"]]
    files: Positional[tuple[str, ...]] = ()
    count: int
    seed: int = 0
    task: Literal["read", "read_boxes", "locate", "act", "document"] = "read"
    degrade: float = 0.0
    fonts: tuple[str, ...] = ()
    browser: str | None = None


def run(words: list[str]) -> int:
    options = parse(DataRender, words, "jvlm data render")
    if not options.files:
        raise UserError("jvlm data render: no files; give inputs, or globs of them")

    from jvlm.data.prepare.render.source import RenderedExamples, Rendering

    with RenderedExamples(options.files, options.settings(Rendering)) as drawn:
        done = options.write(drawn, "drawing")
    print(done.text())
    return 0
