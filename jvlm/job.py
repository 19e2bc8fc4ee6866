"""The main job, from an experiment to a scored, exported, reported model."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

import jvlm
from jvlm.adapters.attach import extract
from jvlm.adapters.merge import merge
from jvlm.adapters.peft_write import write_peft
from jvlm.data.content import Conversation
from jvlm.data.errors import ExampleError, Rejected, grouped
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.evaluation import gains, report, score, usable
from jvlm.evaluation.aim import AimMissed, aims_of, missed_aims
from jvlm.evaluation.gains import Gain
from jvlm.evaluation.questions import TextOnlyBaseline, normalise
from jvlm.evaluation.score import YES_NO, Answer, Scores
from jvlm.inference import sharding
from jvlm.inference.generate import generate
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.parallel import hosts
from jvlm.parallel.layout import MeshLayout
from jvlm.training import hub_pins, log, push, trainable
from jvlm.training.config import Experiment
from jvlm.training.log import clock
from jvlm.training.runs import Result, train
from jvlm.training.side_files import write_json, write_lines
from jvlm.training.starting_model import base_of, start_model
from jvlm.training.trainer import split
from jvlm.weights import frozen, hf, table
from jvlm.weights.io import load

ANSWERS, SCORES, EXPORT, REPORT = "answers.jsonl", "scores.json", "hf", "report.html"
ADAPTER = "adapter"
ANSWERS_BEFORE = "answers_before_training.jsonl"
NOT_ASKED = "evaluation_rejected.jsonl"
_CURVES = (
    ("loss", "loss"),
    ("token accuracy", "token_acc"),
    ("validation loss", "eval_loss"),
    ("validation token accuracy", "eval_token_acc"),
)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TextOnlyScores:
    """Accuracy of answering without the image: overall, yes/no questions, the others."""

    accuracy: float
    yes_no: float
    other: float


def run(experiment: Experiment, train: Callable[[Experiment], Result] = train) -> Path:
    """Train, score, export, read the export back, and write the report. Returns the run folder.

    Of several processes all train; the first does the rest by itself, from the last checkpoint, while the others wait:
    it exports one tensor after another, and scores with the model on its own devices.

    Raises:
      UserError, RuntimeError: something after the training failed; all else was done before it is raised.
      AimMissed: all of this is done, but the scores are below an aim of the configuration.
    """
    began = time.perf_counter()
    if experiment.export.enabled and experiment.model is not None:
        table.export_format(experiment.model)  # better refused now than after the training
    result = train(experiment)
    experiment, _ = hub_pins.pin(experiment)  # as the run has noted them
    if jax.process_count() > 1:
        # parts of it are on other hosts, and the memory is needed
        result = dataclasses.replace(result, model=split(result.model)[0])
    missed = hosts.broadcast_from_0(
        hosts.run_on_all(lambda: _finish(experiment, result, began) if hosts.is_rank0() else [])
    )
    if missed:
        raise AimMissed(f"{'; '.join(missed)}. Answers, scores and report are in {result.folder}")
    return result.folder


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What scoring gave; all of it empty where there was none.

    Attributes:
      before: answers of the model before training, to the same questions in the same order.
      changes: what training changed, where both are there.
    """

    answers: Sequence[Answer] = ()
    scores: Scores | None = None
    text_only: TextOnlyScores | None = None
    before: Sequence[Answer] = ()
    changes: Sequence[Gain] = ()


class _Finish:
    """Does the parts of the end one by one; one that fails is noted, and the others are done all the same."""

    def __init__(self):
        self.failures: list[tuple[str, Exception]] = []

    def part(self, name: str, work: Callable[[], T], otherwise: T) -> T:
        """Return what ``work`` gives, or ``otherwise`` where it fails."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  (raised by `end`, when nothing can be lost any more)
            self.failures.append((name, error))
            print(
                f"{name} FAILED ({type(error).__name__}: {error}); going on with the rest", file=sys.stderr, flush=True
            )
            return otherwise

    def end(self, folder: Path) -> None:
        """Raise what failed: as a UserError if all of it is."""
        if not self.failures:
            return
        failed = "\n".join(f"  {name}: {error}" for name, error in self.failures)
        text = f"the model is trained, and all else is in {folder}, but this failed:\n{failed}\n"
        text += "Fix it; the same command does the rest again without training"
        last = self.failures[-1][1]
        mistakes = all(isinstance(error, UserError) for _, error in self.failures)
        raise (UserError if mistakes else RuntimeError)(text) from last


def _finish(experiment: Experiment, result: Result, began: float) -> list[str]:
    """All that comes after training, the export first; ``began`` is when the job did, by `time.perf_counter`.

    Returns the aims missed.

    Raises:
      UserError, RuntimeError: parts that failed, after the others were done.
    """
    finish = _Finish()
    evaluated, exported = Evaluated(), "not asked for"
    if experiment.export.enabled:
        exported = finish.part("export", lambda: export(experiment, result), "failed")
    if experiment.evaluation.data:
        evaluated = finish.part("scoring", lambda: evaluate(experiment, result, finish), evaluated)
    if experiment.export.enabled and exported != "failed":
        answers, otherwise = evaluated.answers, f"{exported}, not the same"
        exported = finish.part("reading the export back", lambda: verify(experiment, result, answers), otherwise)
    if experiment.push.hub_model_id:
        finish.part("upload", lambda: upload(experiment, result, evaluated.scores), None)
    seconds = time.perf_counter() - began
    written = finish.part("report", lambda: write_report(experiment, result, evaluated, exported, seconds), None)
    result.storage.push()
    if written:
        print(f"report: {written}")
    finish.end(result.folder)
    return missed_aims(experiment.evaluation, evaluated.scores, evaluated.changes)


def evaluate(experiment: Experiment, result: Result, finish: _Finish) -> Evaluated:
    """Answers and scores on the evaluation data, written to the run folder and printed.

    Examples that cannot be asked are left out, counted and listed.
    """
    config = experiment.evaluation
    began = time.perf_counter()
    model = result.model
    layout = _layout(result)
    if jax.process_count() > 1:
        parameter_sharding = layout.parameter if layout else None
        model, _ = load(result.folder, precision=model.config.precision, step=result.last, sharding=parameter_sharding)
    settings = {"ask": config.ask, "max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    answers, rejected = _asked(experiment, model, result.processor, {**settings, "layout": layout})
    score.write(answers, result.folder / ANSWERS)
    (result.folder / NOT_ASKED).unlink(missing_ok=True)
    if rejected:
        write_lines(result.folder / NOT_ASKED, map(dataclasses.asdict, rejected))
        listed = result.folder / NOT_ASKED
        print(f"{len(rejected)} evaluation examples left out (listed in {listed}):\n{grouped(rejected)}")
    seconds = time.perf_counter() - began
    scores = Scores.of(answers)
    baseline = None
    if config.text_only_baseline and scores.questions:
        baseline = finish.part("text-only baseline", lambda: text_only_baseline(experiment, answers), None)
    before: list[Answer] = []
    if config.before_training:
        before = finish.part("scoring the model before training", lambda: answers_before(experiment, result), before)
    scores_before = Scores.of(before) if before else None
    values = {**dataclasses.asdict(scores), "examples_left_out": len(rejected), "seconds": seconds}
    values["text_only_baseline"] = dataclasses.asdict(baseline) if baseline else None
    values["before_training"] = dataclasses.asdict(scores_before) if before else None
    changes = gains.gains(before, answers) if before else []
    values["changes"] = [dataclasses.asdict(change) for change in changes]
    values["training_seconds"] = result.seconds
    fill = log.fill(log.read(result.folder))  # packing changes scores a little
    values["fill"] = fill._asdict() if fill else None
    values["missed_aims"] = missed_aims(config, scores, changes)
    write_json(result.folder / SCORES, values)
    print(summary(scores, baseline, seconds))
    if changes:
        print(gains.table(changes))
    return Evaluated(answers, scores, baseline, before, changes)


def answers_before(experiment: Experiment, result: Result) -> list[Answer]:
    """Return the answers of the model that the run started from to the evaluation data, and write them down."""
    config, layout = experiment.evaluation, _layout(result)
    model, _ = start_model(experiment, layout.parameter if layout else None)
    settings = {"ask": config.ask, "max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    answers, _ = _asked(experiment, model, result.processor, {**settings, "layout": layout})
    score.write(answers, result.folder / ANSWERS_BEFORE)
    return answers


def _asked(
    experiment: Experiment, model: VLM, processor: Processor, settings: dict[str, Any]
) -> tuple[list[Answer], list[Rejected]]:
    """Answers, and the examples that cannot be asked. Raises UserError if there are no others."""
    config = experiment.evaluation

    def answered(read: Callable[[tuple], Conversation]) -> tuple[list[Answer], list[Rejected]]:
        rejected: list[Rejected] = []
        reading = {"options": config.options(), "max_examples": config.max_examples}
        examples = list(usable.examples_of(config.data, read, **reading, rejected=rejected))
        if not examples:
            raise UserError(f"none of the examples of {', '.join(config.data)} can be asked:\n{grouped(rejected)}")
        return score.ask(model, processor, examples, **settings), rejected

    try:
        return answered(usable.parsed)
    except ExampleError:  # read well, but something else is wrong with one of them, its images most likely
        return answered(functools.partial(usable.encode, processor=processor))


def _layout(result: Result) -> MeshLayout | None:
    """Where to generate: on all devices of this process."""
    return sharding.inference_layout(result.model.config, devices=jax.local_devices())


def text_only_baseline(experiment: Experiment, answers: Sequence[Answer]) -> TextOnlyScores:
    """Return what the training data's most frequent answers score on the same questions.

    Raises:
      ExampleError: a bad training example, unless ``data.on_bad_example`` leaves such examples out.
    """
    rejected: list[Rejected] = []
    skip = experiment.data.on_bad_example == "skip"
    options = FormatOptions.of(experiment.data)
    examples = usable.training_conversations(experiment.data.files, options, rejected=rejected if skip else None)
    asked = [a.question for a in answers if not a.question.boxes]
    baseline = TextOnlyBaseline(examples, asked)
    if rejected:
        print(f"text-only baseline: {len(rejected)} training examples left out:\n{grouped(rejected)}")
    yes_no = [q for q in asked if normalise(q.expected) in YES_NO]
    other = [q for q in asked if normalise(q.expected) not in YES_NO]
    return TextOnlyScores(baseline.accuracy(asked), baseline.accuracy(yes_no), baseline.accuracy(other))


def summary(scores: Scores, baseline: TextOnlyScores | None, seconds: float) -> str:
    """Return the result as lines for the terminal."""
    lines = []
    if scores.questions:
        blind = f"   text-only baseline {100 * baseline.accuracy:.1f} %" if baseline else ""
        lines.append(f"accuracy   {100 * scores.accuracy:5.1f} %  on {scores.questions} questions{blind}")
        parts = {
            "yes/no": (scores.yes_no, baseline and baseline.yes_no),
            "other": (scores.other, baseline and baseline.other),
        }
        for name, (share, below) in parts.items():
            if share is not None:
                blind = f"   text-only baseline {100 * below:.1f} %" if below is not None else ""
                lines.append(f"  {name:<8} {100 * share:5.1f} %{blind}")
    if scores.boxes:
        lines.append(
            f"mean IoU   {scores.mean_iou:7.3f}  on {scores.boxes} boxes; "
            f"IoU >= 0.5: {100 * scores.iou_at_half:.1f} %; answers without a box: {scores.unparsed_boxes}"
        )
    return "\n".join([*lines, f"asked in {clock(seconds)}"])


def export(experiment: Experiment, result: Result) -> str:
    """Write the Hugging Face folder. Returns a line that says where."""
    folder = result.folder / EXPORT
    if result.model.adapters is not None:
        return _export_merged(experiment, result, folder)
    saved = None
    if jax.process_count() > 1:
        shapes = {path: v.get_value().shape for path, v in vlm.parameters(result.model).items()}
        saved = frozen.open_run(result.folder, shapes, result.last).read
    hf.save(result.model, result.processor, folder, dtype=experiment.export.dtype, read=saved)
    return f"{folder}"


def upload(experiment: Experiment, result: Result, scores: Scores | None) -> None:
    """Upload the result, with its scores in the card.

    Raises:
      UserError, HubUnavailable: that failed, or uploads of checkpoints did.
    """
    model = result.model
    if jax.process_count() > 1:
        model, _ = load(result.folder, precision=model.config.precision, step=result.last)
    measured = dataclasses.asdict(scores) if scores else {}
    known = {name: measured.get(name) for name in ("accuracy", "mean_iou", "iou_at_half")}
    values = {name: value for name, value in known.items() if value is not None}
    push.push_result(experiment, model, result.processor, result.folder, values)
    if result.failed_uploads:
        raise UserError(
            f"{len(result.failed_uploads)} checkpoints were not uploaded:\n" + "\n".join(result.failed_uploads)
        )


def _export_merged(experiment: Experiment, result: Result, folder: Path) -> str:
    """Write the model with its adapters merged, and the adapters by themselves as a PEFT folder beside it."""
    model = result.model
    if jax.process_count() > 1:
        model, _ = load(result.folder, precision=model.config.precision, step=result.last)
    weights = extract(model)
    write_peft(weights, model.config, result.folder / ADAPTER, base_name=base_of(experiment))
    whole = merge(model, weights)
    hf.save(whole, result.processor, folder, dtype=experiment.export.dtype)
    print(f"adapters: {result.folder / ADAPTER}")
    return f"{folder}, adapters merged"


def verify(experiment: Experiment, result: Result, answers: Sequence[Answer]) -> str:
    """Read the exported folder back, and compare answers. Returns a line about the comparison.

    Raises:
      RuntimeError: the folder read back answers differently.
    """
    folder = result.folder / EXPORT
    again = answers[: experiment.export.verify]
    if not again:
        print(f"exported to {folder} (nothing to compare answers on)")
        return f"{folder}, not compared"
    layout = _layout(result)
    parameter_sharding = layout.parameter if layout else None
    model, processor = load(folder, precision=result.model.config.precision, sharding=parameter_sharding)
    if experiment.evaluation.ask == "independent":
        prompts = [a.question.conversation for a in again]
        settings = {"max_new_tokens": experiment.evaluation.max_new_tokens, "layout": layout}
        texts = generate(model, processor, prompts, batch_size=experiment.evaluation.batch_size, **settings)
    else:
        compared = {a.question.origin for a in again}
        config = experiment.evaluation
        reading = {"options": config.options(), "max_examples": config.max_examples}
        readable = usable.examples_of(config.data, **reading, rejected=[])
        examples = [example for example in readable if example.origin in compared]
        again = [a for a in answers if a.question.origin in compared]
        texts = [a.response for a in score.ask(model, processor, examples, ask="multi_turn", layout=layout)]
    different = [(a, t) for a, t in zip(again, texts, strict=True) if a.response != t]
    if different:
        answer, text = different[0]
        raise RuntimeError(
            f"{folder} answers {len(different)} of {len(again)} questions differently, first: "
            f"{answer.question.text!r}: {answer.response!r} before, {text!r} after"
        )
    line = f"{folder}, read back: {len(again)} of {len(again)} answers the same"
    print(f"exported to {line}")
    return line


def _adapter_facts(experiment: Experiment, result: Result) -> dict[str, str]:
    """Return what the report says of the adapters; nothing for a run without any."""
    plan = result.model.adapters
    if plan is None:
        return {}
    variables = vlm.variables(result.model)
    chosen = trainable.select(trainable.from_config(experiment.optimizer, plan), variables)
    trained = sum(variable.get_value().size for variable in chosen.values())
    ranks = sorted({rank for group in plan.groups for rank in group.ranks if rank})
    matrices = sum(bool(rank) for group in plan.groups for rank in group.ranks)
    kind = "DoRA" if plan.config.use_dora else "LoRA"
    return {
        "base": f"{experiment.init_from or 'random weights'}, which stays as it is",
        "adapters": f"{kind} of rank {', '.join(map(str, ranks))} on {matrices} matrices: {result.folder / ADAPTER}",
        "trained": f"{trained:,} parameters beside {sum(vlm.parameter_counts(result.model).values()):,} of the base",
    }


def _speed_facts(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return how full sequences were, and how a run spent its time at its end: in training, or also in rollouts."""
    facts, last = {}, lines[-1]
    if fill := log.fill(lines):
        facts["sequences filled"] = str(fill)
    if "data_wait" in last:
        facts["waiting for data"] = f"{100 * last['data_wait']:.1f} % of the time"
        facts["speed"] = f"{last['tokens_per_s']:,.0f} tokens a second"
    if "decode_tokens_per_s" in last:
        facts["last rollout"] = (
            f"{last['decode_tokens_per_s']:,.0f} tokens a second; {100 * last['rollout_idle']:.1f} % idle; "
            f"{100 * last['waste']:.1f} % of the groups not needed"
        )
    return facts


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[report.Curve]:
    """Return the curves of a run: of one that learns from rewards those, whose loss says nothing; else loss and
    accuracy, without the untrained model, which would flatten the rest."""
    rewards = _reward_curves(lines)
    if rewards:
        return [report.curve(title, lines, key) for title, key in rewards]
    known = [(title, key) for title, key in _CURVES if any(line.get(key) is not None for line in lines)]
    return [report.curve(title, lines, key, skip_first=True) for title, key in known]


def _reward_curves(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return title and key of each task's rewards, of sampled answers and of greedy ones to held-out prompts."""
    keys = sorted({key for line in lines for key in line if key.startswith(("reward/", "eval_reward/"))})
    titles = {"reward": "reward of sampled answers", "eval_reward": "held-out reward, greedy"}
    plain = [key.split("/") for key in keys if key.count("/") == 1]
    return [(f"{titles[kind]}: {task}", f"{kind}/{task}") for kind, task in plain]


def write_report(
    experiment: Experiment,
    result: Result,
    evaluated: Evaluated,
    exported: str,
    seconds: float,
) -> Path:
    """Write the run's HTML page. Returns where it is."""
    scores, baseline = evaluated.scores, evaluated.text_only
    before = Scores.of(evaluated.before) if evaluated.before else None
    every = log.read(result.folder)
    lines = [line for line in every if "loss" in line]
    counts = vlm.parameter_counts(result.model)
    total = f"{sum(counts.values()):,} parameters"
    last = lines[-1]
    facts = {
        "parameters": ", ".join(f"{tower} {count:,}" for tower, count in counts.items()),
        **_adapter_facts(experiment, result),
        "training": f"{result.steps} steps in {clock(result.seconds)}, {result.compilations} compilation(s)",
        "time in all": clock(seconds),
        "data": f"{', '.join(experiment.data.files)}; {last['epoch']:g} epochs; {result.rejected} examples left out",
        **_speed_facts(lines),
        "export": exported,
        "jvlm": jvlm.__version__,
    }
    if aims := aims_of(experiment.evaluation):
        missed = missed_aims(experiment.evaluation, scores, evaluated.changes)
        facts["aim"] = f"{', '.join(aims)}: {'; '.join(missed) or 'reached'}"
    headline, bars = [], []
    if scores and scores.questions:
        note = f"text-only baseline {100 * baseline.accuracy:.1f} %" if baseline else f"{scores.questions} questions"
        if before:
            note += f"; {100 * before.accuracy:.1f} % before training"
        headline.append((f"{100 * scores.accuracy:.1f} %", f"of {scores.questions:,} test questions", note))
        bars.append(("all", scores.accuracy, baseline.accuracy if baseline else None))
        for name in ("yes_no", "other"):
            if getattr(scores, name) is not None:
                bars.append(
                    (name.replace("_", "/"), getattr(scores, name), getattr(baseline, name) if baseline else None)
                )
    if scores and scores.boxes:
        note = f"{100 * scores.iou_at_half:.1f} % with IoU of 0.5 or more"
        if before:
            note += f"; {before.mean_iou:.3f} before training"
        headline.append((f"{scores.mean_iou:.3f}", f"mean IoU of {scores.boxes:,} boxes", note))
    headline.append((clock(result.seconds), "training", facts.get("trained", total)))
    path = result.folder / REPORT
    report.write(
        path,
        title=experiment.name,
        headline=headline,
        bars=bars,
        curves=_curves(every),
        changes=evaluated.changes,
        images=report.shown_images(evaluated.answers, result.processor.media_roots, before=evaluated.before),
        facts=facts,
    )
    return path
