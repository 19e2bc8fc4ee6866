"""``jvlm report``: runs that follow one another on one page, task by task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare the stages of a training on one page: scores by task with intervals, curves, what the last one changed.

    A task is a file of evaluation.data, which all runs are best asked. The tables are printed as Markdown too.

    Attributes:
      runs: run folders, in the order in which they were trained.
      output: HTML file to write.
      title: of the page; the file's name without it.
    """

    runs: Positional[tuple[Path, ...]] = ()
    output: Path = Path("runs.html")
    title: str | None = None


def run(words: list[str]) -> int:
    options = parse(Report, words, "jvlm report")
    if not options.runs:
        raise UserError("jvlm report: no runs; give their folders, in the order in which they were trained")

    from jvlm.data.view.page import check_target, write
    from jvlm.sweep import tasks, tasks_page

    check_target(options.output)
    runs = [tasks.read(folder) for folder in options.runs]
    write(options.output, tasks_page.render(runs, options.title or options.output.stem))
    print(tasks.markdown(runs))
    print(f"page: {options.output}")
    return 0
