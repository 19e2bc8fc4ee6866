"""``jvlm data view``: data as a page to look at."""

from __future__ import annotations

import dataclasses

from tyro.conf import Positional

from jvlm import configs
from jvlm.cli.data_check import DataFields, config_of_words, data_of_runs, held_out_of
from jvlm.errors import UserError
from jvlm.options import parse_with

PROGRAM = "jvlm data view"


@dataclasses.dataclass(frozen=True)
class DataView:
    """Write a page to look at data: numbers of each source, rejected examples, samples as the model gets them.

    Settings of the data are options too, as in training. The counts are those of jvlm data check.

    Attributes:
      files: data files, or globs; without any, the data of --config and of its stages.
      model: folder whose tokenizer and image limits to encode with.
      config: view as this experiment would train: a Python file, or the name of a shipped config. All of its fields
        are options then.
      media_root: folder for relative image paths, after the data file's own.
      output: HTML file to write.
      samples: usable examples to show of each source, beside its longest, shortest and those with most images.
    """

    files: Positional[tuple[str, ...]] = ()
    model: str | None = None
    config: str | None = None
    media_root: str | None = None
    output: str = "report.html"
    samples: int = 6

    def __post_init__(self):
        if self.samples < 0:
            raise UserError(f"--samples must be at least 0, got {self.samples}")


def run(words: list[str]) -> int:
    config = config_of_words(words)
    options, fields = parse_with(DataView(), DataFields() if config is None else configs.load(config), words, PROGRAM)
    if options.model is None and options.config is None:
        raise UserError("jvlm data view shows tokens and patches: give --model DIR or --config")
    from jvlm.data import stores
    from jvlm.data.view import page
    from jvlm.data.view.run_view import run_view

    target = stores.on_disk(options.output, "a page is")
    page.check_target(target)
    runs = data_of_runs(options, fields)
    if not all(data.files for _, data, _, _ in runs):
        raise UserError("no data to view: give files, or a --config that names them as data.train")
    held_out = held_out_of(fields)
    views = [
        run_view(name, data, processor, seed=seed, samples=options.samples, held_out=held_out)
        for name, data, processor, seed in runs
    ]
    content = page.render(views)
    page.write(target, content)
    rows = [view.total or view.rows[0] for view in views]
    usable, examples = sum(row.usable for row in rows), sum(row.examples for row in rows)
    print(f"{target}: {len(content) / 1e6:.1f} MB; {usable:,} of {examples:,} examples can be used")
    return 0
