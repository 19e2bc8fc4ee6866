"""The main job, from an experiment to a scored, exported, reported model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import jvlm
from jvlm.data.rows import Conversation
from jvlm.evaluation import report, score
from jvlm.evaluation.questions import TextOnlyFloor, normalise
from jvlm.evaluation.score import YES_NO, Answer, Scores
from jvlm.inference import serving
from jvlm.inference.generate import generate
from jvlm.models import vlm
from jvlm.parallel import hosts
from jvlm.parallel.layout import Layout
from jvlm.training import log
from jvlm.training.config import Experiment
from jvlm.training.log import clock
from jvlm.training.loop import Result, split, train
from jvlm.weights import checkpoint, run_folder, table
from jvlm.weights.loading import load

ANSWERS, SCORES, EXPORT, REPORT = "answers.jsonl", "scores.json", "hf", "report.html"


@dataclasses.dataclass(frozen=True)
class Floor:
    """Accuracy of answering without the picture: overall, yes/no questions, the others."""

    accuracy: float
    yes_no: float
    other: float


def run(experiment: Experiment) -> Path:
    """Train, score, export, read the export back, and write the report. Returns the run folder.

    Of several processes all train; the first does the rest by itself, from the last checkpoint, while the others wait:
    it scores with the model on its own devices, and exports one tensor after another.
    """
    began = time.perf_counter()
    if experiment.export.enabled and experiment.model is not None:
        table.export_form(experiment.model)  # better refused now than after the training
    result = train(experiment)
    if jax.process_count() > 1:
        # parts of it are on other hosts, and the memory is needed
        result = dataclasses.replace(result, model=split(result.model)[0])
    hosts.together(lambda: _finish(experiment, result, began) if hosts.is_first() else None)
    return result.folder


def _finish(experiment: Experiment, result: Result, began: float) -> None:
    """All that comes after training; ``began`` is when the job did, by `time.perf_counter`."""
    answers, scores, floor = [], None, None
    if experiment.evaluation.data:
        answers, scores, floor = evaluate(experiment, result)
    exported = "not asked for"
    if experiment.export.enabled:
        exported = export(experiment, result, answers)
    write_report(experiment, result, answers, scores, floor, exported, time.perf_counter() - began)
    result.home.push()
    print(f"report: {result.folder / REPORT}")


def evaluate(experiment: Experiment, result: Result) -> tuple[list[Answer], Scores, Floor | None]:
    """Answers and scores on the evaluation data, written to the run folder and printed."""
    config = experiment.evaluation
    rows = score.load_rows(config.data, config.max_rows)
    began = time.perf_counter()
    model = result.model
    layout = _layout(result)
    if jax.process_count() > 1:
        place = layout.parameter if layout else None
        model, _ = load(result.folder, numerics=model.config.numerics, step=result.last, sharding=place)
    answers = score.ask(
        model,
        result.processor,
        rows,
        ask=config.ask,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        layout=layout,
    )
    seconds = time.perf_counter() - began
    scores = Scores.of(answers)
    floor = text_only_floor(experiment, answers) if config.text_only_floor and scores.questions else None
    score.write(answers, result.folder / ANSWERS)
    values = {**dataclasses.asdict(scores), "seconds": seconds}
    values["text_only_floor"] = dataclasses.asdict(floor) if floor else None
    (result.folder / SCORES).write_text(json.dumps(values, indent=2) + "\n")
    print(summary(scores, floor, seconds))
    return answers, scores, floor


def _layout(result: Result) -> Layout | None:
    """Where to generate: on all devices of this process."""
    return serving.layout(result.model.config, devices=jax.local_devices())


def text_only_floor(experiment: Experiment, answers: Sequence[Answer]) -> Floor:
    """What the training data's most frequent answers score on the same questions."""
    rows: list[Conversation] = score.load_rows(experiment.data.train)
    blind = TextOnlyFloor(rows)
    asked = [a.question for a in answers if not a.question.boxes]
    yes_no = [q for q in asked if normalise(q.expected) in YES_NO]
    other = [q for q in asked if normalise(q.expected) not in YES_NO]
    return Floor(blind.accuracy(asked), blind.accuracy(yes_no), blind.accuracy(other))


def summary(scores: Scores, floor: Floor | None, seconds: float) -> str:
    """The result as lines for the terminal."""
    lines = []
    if scores.questions:
        blind = f"   text-only floor {100 * floor.accuracy:.1f} %" if floor else ""
        lines.append(f"accuracy   {100 * scores.accuracy:5.1f} %  on {scores.questions} questions{blind}")
        parts = {"yes/no": (scores.yes_no, floor and floor.yes_no), "other": (scores.other, floor and floor.other)}
        for name, (share, below) in parts.items():
            if share is not None:
                blind = f"   text-only floor {100 * below:.1f} %" if below is not None else ""
                lines.append(f"  {name:<8} {100 * share:5.1f} %{blind}")
    if scores.boxes:
        lines.append(
            f"mean IoU   {scores.mean_iou:7.3f}  on {scores.boxes} boxes; "
            f"IoU >= 0.5: {100 * scores.iou_at_half:.1f} %; answers without a box: {scores.unparsed_boxes}"
        )
    return "\n".join([*lines, f"asked in {clock(seconds)}"])


def export(experiment: Experiment, result: Result, answers: Sequence[Answer]) -> str:
    """Write the Hugging Face folder, read it back, and compare answers. Returns a line that says what was found.

    Raises:
      ValueError: the folder read back answers differently.
    """
    folder = result.folder / EXPORT
    saved = None
    if jax.process_count() > 1:
        shapes = {path: v.get_value().shape for path, v in vlm.parameters(result.model).items()}
        saved = run_folder.Arrays(run_folder.params_folder(result.folder, result.last), shapes).read
    checkpoint.save(result.model, result.processor, folder, dtype=experiment.export.dtype, read=saved)
    again = answers[: experiment.export.verify]
    if not again:
        print(f"exported to {folder} (nothing to compare answers on)")
        return f"{folder}, not compared"
    layout = _layout(result)
    place = layout.parameter if layout else None
    model, processor = load(folder, numerics=result.model.config.numerics, sharding=place)
    if experiment.evaluation.ask == "alone":
        prompts = [a.question.conversation for a in again]
        settings = {"max_new_tokens": experiment.evaluation.max_new_tokens, "layout": layout}
        texts = generate(model, processor, prompts, batch_size=experiment.evaluation.batch_size, **settings)
    else:
        rows = score.load_rows(experiment.evaluation.data, experiment.evaluation.max_rows)
        kept = {a.question.origin for a in again}
        rows = [row for row in rows if row.origin in kept]
        again = [a for a in answers if a.question.origin in kept]
        texts = [a.response for a in score.ask(model, processor, rows, ask="chain", layout=layout)]
    different = [(a, t) for a, t in zip(again, texts, strict=True) if a.response != t]
    if different:
        answer, text = different[0]
        raise ValueError(
            f"{folder} answers {len(different)} of {len(again)} questions differently, first: "
            f"{answer.question.text!r}: {answer.response!r} before, {text!r} after"
        )
    line = f"{folder}, read back: {len(again)} of {len(again)} answers the same"
    print(f"exported to {line}")
    return line


def write_report(
    experiment: Experiment,
    result: Result,
    answers: Sequence[Answer],
    scores: Scores | None,
    floor: Floor | None,
    exported: str,
    seconds: float,
) -> None:
    """The run's HTML page."""
    lines = log.read(result.folder)
    counts = vlm.parameter_counts(result.model)
    last = lines[-1]
    facts = {
        "parameters": ", ".join(f"{tower} {count:,}" for tower, count in counts.items()),
        "training": f"{result.steps} steps in {clock(result.seconds)}, {result.compilations} compilation(s)",
        "time in all": clock(seconds),
        "data": f"{', '.join(experiment.data.train)}; {last['epoch']} epochs; {result.rejected} rows left out",
        "padding": f"text {100 * last['padding_text']:.1f} %, patches {100 * last['padding_patches']:.1f} %",
        "waiting for data": f"{100 * last['data_wait']:.1f} % of the time",
        "speed": f"{last['tokens_per_s']:,.0f} tokens a second",
        "export": exported,
        "jvlm": jvlm.__version__,
    }
    headline, bars = [], []
    if scores and scores.questions:
        note = f"text-only floor {100 * floor.accuracy:.1f} %" if floor else f"{scores.questions} questions"
        headline.append((f"{100 * scores.accuracy:.1f} %", f"of {scores.questions:,} test questions", note))
        bars.append(("all", scores.accuracy, floor.accuracy if floor else None))
        for name in ("yes_no", "other"):
            if getattr(scores, name) is not None:
                bars.append((name.replace("_", "/"), getattr(scores, name), getattr(floor, name) if floor else None))
    if scores and scores.boxes:
        note = f"{100 * scores.iou_at_half:.1f} % with IoU of 0.5 or more"
        headline.append((f"{scores.mean_iou:.3f}", f"mean IoU of {scores.boxes:,} boxes", note))
    headline.append((clock(result.seconds), "training", f"{sum(counts.values()):,} parameters"))
    report.write(
        result.folder / REPORT,
        title=experiment.name,
        headline=headline,
        bars=bars,
        curves=[report.curve("loss", lines, "loss"), report.curve("token accuracy", lines, "token_acc")],
        pictures=report.pictures(answers, result.processor.media_roots),
        facts=facts,
    )
