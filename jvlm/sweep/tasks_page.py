"""Runs that follow one another as one HTML page: tasks by runs, curves, what the last run changed, pictures."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import PIL.Image

from jvlm.data.content import Conversation
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_conversation
from jvlm.data.images import open_image
from jvlm.evaluation import report
from jvlm.evaluation.report import Curve
from jvlm.scoring.statistics import Comparison, Interval
from jvlm.sweep import tasks
from jvlm.sweep.tasks import Answered, Key, TaskRun
from jvlm.training import log
from jvlm.training.log import clock

_SIDE = 160  # pixels of a picture's longer side on the page, at least
_GAP = 2  # pixels between pictures of one question
_MOST_WORDS = 160


@dataclasses.dataclass(frozen=True)
class Cell:
    """A score on the page: its colour's strength from 0 to 1, and its text."""

    strength: float
    text: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A task: questions, a cell for each run, and what the last run changed."""

    task: str
    questions: int
    regions: bool
    cells: tuple[Cell | None, ...]
    change: Comparison | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A question with its pictures side by side, and the answer of each run; places are pixels of the first picture."""

    task: str
    source: str | None
    width: int
    height: int
    question: str
    expected: str
    answers: tuple[tuple[str, Answered], ...]

    @property
    def last_two(self) -> list[tuple[str, Answered]]:
        """The runs whose places are drawn: the last but one in blue, the last in red."""
        return list(self.answers[-2:])


def rows(runs: Sequence[TaskRun]) -> list[Row]:
    """Return the table of tasks by runs."""
    found = []
    for task in tasks.tasks_of(runs):
        having = [run.answers[task] for run in runs if task in run.answers]
        cells = tuple(_cell(tasks.score(run, task)) for run in runs)
        compared = tasks.change(runs[-2], runs[-1], task) if len(runs) > 1 else None
        said = tasks.verdict(compared) if compared else ""
        regions = all(answer.regions for answer in having[0].values())
        found.append(Row(task, max(map(len, having)), regions, cells, compared, said))
    return found


def _cell(score: Interval | None) -> Cell | None:
    return None if score is None else Cell(score.value, tasks.percent(score))


def pictures(runs: Sequence[TaskRun], *, each: int = 3) -> list[Picture]:
    """Return questions of every task: those that the last run gained most by and lost most by, and the first one."""
    last, before = runs[-1], runs[-2] if len(runs) > 1 else runs[-1]
    found = []
    for task in tasks.tasks_of([last]):
        own, earlier = last.answers[task], before.answers.get(task, {})
        both = [key for key in own if key in earlier]
        by_gain = sorted(both, key=lambda key: earlier[key].score - own[key].score)
        chosen = list(dict.fromkeys([*by_gain[: each - 2], *by_gain[-1:], *own]))[:each]
        source = ExampleSource([last.files[task]])
        found += [_picture(runs, task, key, source) for key in chosen]
    return found


def _picture(runs: Sequence[TaskRun], task: str, key: Key, source: ExampleSource) -> Picture:
    origin, record = source[key[0] - 1]
    if isinstance(record, ExampleError):
        raise record
    image = _image(parse_conversation(record, origin), origin)
    answers = tuple((run.name, run.answers[task][key]) for run in runs if key in run.answers.get(task, {}))
    first = answers[-1][1]
    uri, size = None, (0, 0)
    if image is not None:
        file = io.BytesIO()
        image.save(file, "PNG")
        uri, size = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), image.size
    return Picture(task, uri, *size, _cut(first.question), _cut(first.expected), answers)


def _image(conversation: Conversation, origin: Origin) -> PIL.Image.Image | None:
    """Return all pictures and frames of a conversation side by side; None where it has none."""
    sources = [image.source for image in conversation.images]
    sources += [frame for video in conversation.videos for frame in video.frames]
    if not sources:
        return None
    opened = [open_image(one, origin=origin, roots=(str(Path(origin.file).parent),)) for one in sources]
    width = sum(one.width for one in opened) + _GAP * (len(opened) - 1)
    image = PIL.Image.new("RGB", (width, max(one.height for one in opened)), (255, 255, 255))
    left = 0
    for one in opened:
        image.paste(one, (left, 0))
        left += one.width + _GAP
    return image


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_WORDS else text[:_MOST_WORDS] + " ..."


def curves(run: TaskRun) -> list[Curve]:
    """Return the loss of a run's training; of one that learns from rewards its rewards."""
    keys = sorted({key for line in run.log for key in line if key.startswith("eval_reward/") and key.count("/") == 1})
    if keys:
        return [report.curve(f"held-out reward: {key.partition('/')[2]}", run.log, key) for key in keys]
    lines = [line for line in run.log if line.get("loss") is not None]
    return [report.curve("loss", lines, "loss", skip_first=True)] if lines else []


def losses(runs: Sequence[TaskRun]) -> list[tuple[str, list[float | None]]]:
    """Return the held-out loss of a token, of each task and run."""
    names = list(dict.fromkeys(task for run in runs for task in run.losses))
    return [(name, [run.losses.get(name) for run in runs]) for name in names]


def render(runs: Sequence[TaskRun], title: str) -> bytes:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvlm.sweep", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = tasks.percent
    page = environment.get_template("tasks.html.jinja").render(
        title=title,
        runs=runs,
        times=[None if run.seconds is None else clock(run.seconds) for run in runs],
        fills=[log.fill(run.log) for run in runs],
        fill=tasks.FILL,
        rows=rows(runs),
        losses=losses(runs),
        curves=[(run.name, curves(run)) for run in runs],
        pictures=pictures(runs),
        size=_SIDE,
        cut=_cut,
        width=report.WIDTH,
        height=report.HEIGHT,
    )
    return page.encode("utf-8", "backslashreplace")
