"""``jvlm data render``: images drawn with known text, as examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRender:
    """Draw examples for reading and finding: text, formulas, code, tables, web pages. The same seed gives the same.

    Attributes:
      kind: text draws paragraphs of text files; formula lines of files, as LaTeX; code parts of files of code; table
        parts of CSV files; page HTML files, with headless Chromium.
      files: inputs, or globs of them; they come in turn, each time drawn otherwise.
      output: folder to write; the same command goes on with an interrupted one.
      count: examples.
      seed: for all that is drawn.
      task: read asks for all text, read_boxes for each part with its box, locate for the box of one; document is the
        image and its text, without turns.
      fonts: font files, or globs of them; DejaVu's without it.
      browser: Chromium's file; without it one is looked for on the path.
      examples_per_shard: examples in a file.
      on_bad_example: stop at an input that cannot be drawn, or leave it out; what is left out is counted.
      rejected: JSONL file to write every input to that is left out.
    """

    kind: Positional[Literal["text", "formula", "code", "table", "page"]]
    files: Positional[tuple[str, ...]] = ()
    output: Path
    count: int
    seed: int = 0
    task: Literal["read", "read_boxes", "locate", "document"] = "read"
    fonts: tuple[str, ...] = ()
    browser: str | None = None
    examples_per_shard: int = 1000
    on_bad_example: Literal["error", "skip"] = "error"
    rejected: str | None = None


def run(words: list[str]) -> int:
    options = parse(DataRender, words, "jvlm data render")
    if not options.files:
        raise UserError("jvlm data render: no files; give inputs, or globs of them")

    from jvlm.data.conversion import write_shards
    from jvlm.data.prepare.render.source import RenderedExamples, Rendering
    from jvlm.data.rejections import writing

    settings = Rendering(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Rendering)})
    with RenderedExamples(options.files, settings) as drawn, writing(options.rejected, ()) as on_rejected:
        done = write_shards(
            drawn,
            options.output,
            options.examples_per_shard,
            identity=drawn.identity(),
            on_bad_example=options.on_bad_example,
            on_rejected=on_rejected,
            verb="drawing",
        )
    print(done.text())
    return 0
