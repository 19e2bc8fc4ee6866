"""Asking a model the questions of tasks, and scoring what it answers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import jvlm
from jvlm.data.box_formats import FormatName
from jvlm.data.boxes import CoordinateSpace
from jvlm.data.errors import ExampleError, Rejected, grouped
from jvlm.errors import UserError, file_errors
from jvlm.evaluation import summaries
from jvlm.evaluation.clients import FAILED, Client, Prompt, Reply
from jvlm.evaluation.files import Rows
from jvlm.evaluation.metrics import METRICS, Answered, verifier
from jvlm.evaluation.prompting import prompt, prompt_hash, shown
from jvlm.evaluation.store import LIMIT, SCORE, SCORES, AnswerStore, Stored, write_json, write_lines
from jvlm.evaluation.summaries import NO_JUDGMENT, Scored
from jvlm.evaluation.task import BOXED_TOKENS, Item, Style, Task
from jvlm.evaluation.thumbnails import Thumbnails
from jvlm.inference.requests import SamplingParams
from jvlm.json_files import read_object
from jvlm.progress import Progress
from jvlm.scoring.score import Score

if TYPE_CHECKING:
    from jvlm.evaluation.judges import Judge

_SLOW = ("maths", "maths_or_choice")  # metrics that the running score does not wait for


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user may change about tasks.

    Attributes:
      limit: ask so many questions of each task, drawn at random; a larger limit adds to those of a smaller one.
      style: "boxed" has answers in \\boxed{} of up to 32,768 tokens, MiMo-VL's protocol, in place of the tasks' own
        instructions and lengths.
      runs, shots: replace the tasks' own.
      decoding: fields of `jvlm.evaluation.task.Decoding` that replace the tasks' own.
    """

    limit: int | None = None
    style: Style = "task"
    runs: int | None = None
    shots: int | None = None
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def applied(self, task: Task) -> Task:
        """Return a task with what is changed about it."""
        changed = {name: value for name, value in (("runs", self.runs), ("shots", self.shots)) if value is not None}
        longest = {"max_new_tokens": BOXED_TOKENS} if self.style == "boxed" and task.turns else {}
        return dataclasses.replace(
            task, decoding=dataclasses.replace(task.decoding, **longest | self.decoding), **changed
        )


def evaluate(
    client: Client,
    tasks: Sequence[Task],
    data: Path,
    output: Path,
    settings: Settings = Settings(),
    *,
    judge: Judge | None = None,
    training: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Ask and score tasks, one after another; what OUTPUT has already is not asked again. Returns their records.

    Args:
      judge: scores the answers of tasks whose published scores are judged; without one they are scored by rule.
      training: files of training data in which the questions are looked for.

    Raises:
      UserError: as `check`, before the first question.
    """
    rows = check(tasks, data, output, settings, training=training)
    tasks = [settings.applied(task) for task in tasks]
    records = []
    with verifier():
        for task, own in zip(tasks, rows, strict=True):
            seconds = ask(client, task, own, data, output / task.name, settings)
            if training:
                look_for(task, own, training, output / task.name, settings.limit)
            records.append(score_task(task, output / task.name, judge=judge, seconds=seconds))
    return records


def check(
    tasks: Sequence[Task], data: Path, output: Path, settings: Settings = Settings(), *, training: Sequence[str] = ()
) -> list[Rows]:
    """Check all that can be checked without a model, which takes long to load. Returns the records of each task.

    Raises:
      UserError: decoding outside its range; files that are not there, of any task, its demonstrations or the training
        data; an output that cannot be written, or that holds answers of other settings.
    """
    tasks, rows = [settings.applied(task) for task in tasks], []
    for task in tasks:
        given = dataclasses.asdict(task.decoding)
        SamplingParams(max_tokens=given.pop("max_new_tokens"), **given)
        rows.append(Rows(task.files, data, task.name))
        if task.shots and task.demonstrations:
            Rows(task.demonstrations, data, task.name)
    if training:
        from jvlm.data.example_source import ExampleSource

        ExampleSource(list(training))
    with file_errors(output, "written"):
        output.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        AnswerStore(output / task.name).check(_described(task, settings), partly=True)
    return rows


def _described(task: Task, settings: Settings) -> dict[str, Any]:
    """Return what decides the answers to a task, beside who gives them."""
    return {
        "task": task.name,
        "version": task.version,
        "style": settings.style,
        "shots": task.shots,
        "parser": task.parser,
        "decoding": dataclasses.asdict(task.decoding),
    }


def items(task: Task, rows: Rows, limit: int | None, rejected: list[Rejected]) -> Iterator[Item]:
    """Yield the questions of a task in an order that a limit is a beginning of; those that cannot be read are listed.

    Raises:
      UserError: two questions of one name.
    """
    seen: set[str] = set()
    for index in np.random.default_rng(0).permutation(len(rows)):
        if limit is not None and len(seen) >= limit:
            return
        try:
            found = task.items(rows[int(index)])
        except ExampleError as error:
            rejected.append(Rejected.of(error, "bad"))
            continue
        for item in found[: None if limit is None else limit - len(seen)]:
            if item.id in seen:
                raise UserError(
                    f"task {task.name}: two questions are named {item.id!r}; its item needs fields that differ"
                )
            seen.add(item.id)
            yield item


def ask(client: Client, task: Task, rows: Rows, data: Path, folder: Path, settings: Settings) -> float:
    """Ask what is not answered yet. Returns the seconds that it took."""
    began = time.perf_counter()
    rejected: list[Rejected] = []
    store = AnswerStore(folder)
    described = {
        **_described(task, settings),
        "client": dict(client.describe()),
        "box_form": client.box_form,
        "box_space": client.box_space,
    }
    chosen = list(items(task, rows, None if settings.limit is None else settings.limit + 1, rejected))
    if not chosen:
        raise UserError(f"task {task.name}: no question can be read of {', '.join(rows.paths)}\n{grouped(rejected)}")
    is_part = settings.limit is not None and len(chosen) > settings.limit
    chosen = chosen[: settings.limit]
    with store.writing(described, limit=settings.limit if is_part else None):
        done = store.read()
        shots = _Demonstrations(task, rows, data)
        waiting: dict[str, tuple[Item, int, str, str]] = {}
        thumbnails = Thumbnails(folder)

        def prompts() -> Iterator[Prompt]:
            for item in chosen:
                example = prompt(task, item, shots.of(item), style=settings.style)
                mark = prompt_hash(example)
                thumbnails.add(item)
                for run in range(task.runs):
                    before = done.get((item.id, run))
                    if before is not None and before.prompt_hash != mark:
                        raise UserError(
                            f"{folder}: question {item.id} was asked in other words before; give another --output"
                        )
                    if before is None or before.error:
                        name = f"{item.id}\0{run}"
                        waiting[name] = (item, run, mark, shown(item.content))
                        yield Prompt(name, example, _number(name))

        left = sum(
            (item.id, run) not in done or bool(done[item.id, run].error) for item in chosen for run in range(task.runs)
        )
        total = len(chosen) * task.runs
        with Progress(total=total, initial=total - left, desc=task.name, unit="answer") as bar:
            running = _Running(task, client.box_form, client.box_space)
            if left:
                for reply in client.replies(prompts(), task.decoding):
                    stored = _stored(reply, *waiting.pop(reply.id))
                    store.add(stored)
                    bar.set_postfix(running.add(stored), refresh=False)
                    bar.update()
    if rejected:
        write_lines(folder / "rejected.jsonl", map(dataclasses.asdict, rejected))
        print(
            f"{task.name}: {len(rejected)} records cannot be read ({folder / 'rejected.jsonl'}):\n{grouped(rejected)}"
        )
    return time.perf_counter() - began


def _stored(reply: Reply, item: Item, run: int, mark: str, question: str) -> Stored:
    error = reply.error or (reply.text if reply.text.startswith(FAILED) else "")
    return Stored(
        item,
        run,
        mark,
        question,
        reply.text,
        "error" if error else reply.finish,
        reply.prompt_tokens,
        reply.completion_tokens,
        round(reply.seconds, 4),
        error,
        reply.sizes,
    )


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


class _Demonstrations:
    """Draws the examples before a question, by the question's name."""

    def __init__(self, task: Task, rows: Rows, data: Path):
        self._task = task
        self._rows = Rows(task.demonstrations, data, task.name) if task.shots and task.demonstrations else rows

    def of(self, item: Item) -> list[Item]:
        found: list[Item] = []
        if not self._task.shots:
            return found
        rng = np.random.default_rng(_number(item.id))
        if self._task.demonstrate is not None:
            return self._task.demonstrate(item, self._rows, rng, self._task.shots)
        for index in rng.permutation(len(self._rows)):
            found += [other for other in self._task.items(self._rows[int(index)])[:1] if not _same(other, item)]
            if len(found) == self._task.shots:
                return found
        raise UserError(
            f"task {self._task.name}: {len(found)} demonstrations are there, {self._task.shots} are wanted; "
            "give more records, or --shots"
        )


def _same(one: Item, other: Item) -> bool:
    """Whether two are one question, or two about one image."""
    return one.id == other.id or (bool(one.group) and one.group == other.group)


class _Running:
    """The score so far, for the progress bar."""

    def __init__(self, task: Task, form: FormatName, space: CoordinateSpace | None):
        self._task, self._form, self._space = task, form, space
        metric = METRICS[task.metric]
        self._score = None if metric.corpus or task.metric in _SLOW else metric.scores
        self._sum, self._count, self._failed = 0.0, 0, 0

    def add(self, stored: Stored) -> dict[str, str]:
        """Return what the bar shows after one more answer."""
        self._failed += bool(stored.error)
        shown = {"failed": str(self._failed)} if self._failed else {}
        if self._score is None or stored.error:
            return shown
        value = self._score([answered(stored, self._task, self._form, self._space)])[0].value
        if value is not None:
            self._sum, self._count = self._sum + value, self._count + 1
        return {"score": f"{self._task.unit * self._sum / max(self._count, 1):.1f}", **shown}


def answered(stored: Stored, task: Task, form: FormatName, space: CoordinateSpace | None) -> Answered:
    """Return a reply as metrics take it."""
    return Answered(stored.item, stored.text, task.parser, stored.sizes, form, space)


def scores_of(
    task: Task, replies: Sequence[Stored], form: FormatName, space: CoordinateSpace | None, judge: Judge | None = None
) -> list[Scored]:
    """Return the score of each reply; those of failed requests have none."""
    good = [one for one in replies if not one.error]
    given = [answered(one, task, form, space) for one in good]
    scores = METRICS[task.metric].scores(given)
    if judge is not None and task.judge:
        scores = judge.scores(task, given, [one.question for one in good], scores)
    by_reply = {id(one): score for one, score in zip(good, scores, strict=True)}
    return [_scored(one, by_reply.get(id(one), Score(None, "failed_request"))) for one in replies]


def _scored(stored: Stored, score: Score) -> Scored:
    cut = stored.finish == "length" and score.value == 0 and score.reason in summaries.UNREAD
    return Scored(
        stored.item.id,
        stored.run,
        score.value,
        "truncated" if cut else score.reason,
        stored.finish,
        stored.item.group,
        stored.item.categories,
        stored.item.facts,
        score.parsed,
        stored.prompt_tokens,
        stored.completion_tokens,
        stored.seconds,
    )


def score_task(
    task: Task,
    folder: Path,
    *,
    judge: Judge | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Score the answers of a folder, and write and return the task's record.

    Raises:
      UserError: no answers there, or answers of another task.
    """
    store = AnswerStore(folder)
    replies = list(store.read().values())
    settings = store.settings() if replies else {}
    if settings.get("task") != task.name:
        raise UserError(f"{folder} holds no answers to {task.name}; ask a model first, with --model")
    limit = settings.pop(LIMIT, None)
    scored = scores_of(task, replies, settings["box_form"], settings["box_space"], judge)
    write_lines(folder / SCORES, map(dataclasses.asdict, scored))
    whole = summaries.interval(scored, task.summary)
    judged = judge is not None and task.judge is not None
    record = {
        "task": task.name,
        "group": task.group,
        "version": task.version,
        "metric": f"judge:{judge.name}" if judged and judge else task.metric,
        "summary": task.summary,
        "value": whole.value if whole else None,
        "interval": [whole.low, whole.high] if whole else None,
        "confidence": 0.95,
        "unit": task.unit,
        **summaries.counts(scored),
        "questions": len({one.id for one in scored}),
        "runs": task.runs,
        "limit": limit,
        "error": next((f"question {one.item.id}: {one.error}" for one in replies if one.error), None),
        "categories": summaries.by_category(scored),
        "prompt_hash": _hash(sorted(f"{one.item.id}:{one.prompt_hash}" for one in replies)),
        "judge": judge.describe(task) if judged and judge else _fallback(task),
        "settings": settings,
        "jvlm": jvlm.__version__,
        "code": code_hash(),
        "seconds": round(sum(one.seconds for one in replies) if seconds is None else seconds, 3),
        "prompt_tokens": sum(one.prompt_tokens or 0 for one in replies),
        "completion_tokens": sum(one.completion_tokens or 0 for one in replies),
        "contamination": _contamination(folder, scored, task.summary),
        "published": dict(task.published),
        "paper": task.paper,
        "note": task.note,
    }
    write_json(folder / SCORE, record)
    return record


CONTAMINATION = "contamination.json"


def _contamination(folder: Path, scored: Sequence[Scored], name: str) -> dict[str, Any] | None:
    """Return how many questions training data holds, and the score without them; None where nobody looked."""
    if not (folder / CONTAMINATION).exists():
        return None
    known = read_object(folder / CONTAMINATION)
    dirty = set(known["contaminated"])
    clean = summaries.interval([one for one in scored if one.id not in dirty], name)
    counted = {key: known[key] for key in ("questions", "by_text", "by_image", "training")}
    return counted | {"value_without": clean and clean.value, "interval_without": clean and [clean.low, clean.high]}


def look_for(task: Task, rows: Rows, files: Sequence[str], folder: Path, limit: int | None = None) -> None:
    """Look for a task's questions in training data, and write down which are there."""
    from jvlm.evaluation.contamination import TaskIndex, summary

    index = TaskIndex(items(task, rows, limit, []))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONTAMINATION, {**summary(index, index.find(files)), "training": list(files)})


def _fallback(task: Task) -> str | None:
    return f"none: published scores are judged by a model, these are by rule ({task.metric})" if task.judge else None


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@functools.cache
def code_hash() -> str:
    """Return a hash of the code that makes scores: of all files of jvlm.evaluation and jvlm.scoring."""
    root = Path(jvlm.__file__).parent
    files = sorted((*root.glob("evaluation/**/*.py"), *root.glob("scoring/**/*.py")))
    return _hash([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records as lines for the terminal."""
    lines = [
        f"{'task':<26} {'score':>7}  {'95 % interval':<16} {'asked':>6} {'unread':>6} {'cut':>5} {'failed':>6}  metric"
    ]
    for one in records:
        unit = one["unit"]
        score = "-" if one["value"] is None else f"{unit * one['value']:.1f}"
        limits = "-" if one["value"] is None else f"{unit * one['interval'][0]:.1f} - {unit * one['interval'][1]:.1f}"
        lines.append(
            f"{one['task']:<26} {score:>7}  {limits:<16} {one['answers']:>6} {one['unparsed']:>6} "
            f"{one['truncated']:>5} {one['failed']:>6}  {one['metric']}"
        )
        if one["limit"]:
            lines.append(f"{'':<26} a random part of the task (--limit {one['limit']})")
        if known := one.get("contamination"):
            without = known["value_without"]
            lines.append(
                f"{'':<26} training data holds {known['by_text']} of {known['questions']} questions by their words, "
                f"{known['by_image']} by their pictures; without these "
                + ("nothing is left" if without is None else f"{unit * without:.1f}")
            )
        if unjudged := [f"{count} {name}" for name, count in one["reasons"].items() if name in NO_JUDGMENT]:
            lines.append(f"{'':<26} the judge gave no score to {' and '.join(unjudged)}: left out of the mean")
        if one["failed"]:
            lines.append(f"{'':<26} failed, to be asked again by the same command; the first: {one['error']}")
        if isinstance(one["judge"], str):
            lines.append(f"{'':<26} judge: {one['judge']}")
    return "\n".join(lines)
