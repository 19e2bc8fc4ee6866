"""``jvlm evaluate``: scores of a model on benchmarks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jvlm.cli.model import ImageOptions, ModelOptions, load
from jvlm.data.box_formats import FormatName
from jvlm.data.boxes import CoordinateSpace
from jvlm.errors import UserError
from jvlm.options import FLAT, parse

if TYPE_CHECKING:
    from jvlm.evaluation.clients import Client

SERVERS = ("http://", "https://")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score a model on benchmarks. What --output has already is not asked again.

    Attributes:
      model: a Hugging Face folder, a run folder, an id on the Hub, or http://HOST:PORT/v1 of a server.
      tasks: names of tasks or groups of them, with commas between.
      data: folder with the tasks' files.
      output: folder for answers and scores.
      list: print all tasks and the files that each wants.
      include: Python files with tasks of your own, in a list TASKS.
      limit: ask so many questions of each task, drawn at random.
      style: "boxed" asks for answers in \\boxed{} of up to 32,768 tokens, MiMo-VL's protocol, in place of the tasks'
        own instructions and lengths.
      runs: how often each question is asked; None is the task's own number.
      shots: demonstrations before each question; None is the task's own number.
      max_new_tokens: longest answer; None is the task's own.
      temperature: 0 takes the likeliest token; None is the task's own.
      top_p: keep the likeliest tokens whose probabilities reach this; None is the task's own.
      rescore: score the answers that are there again, without a model.
      compare: two output folders whose scores are compared question by question.
      adapters: NAME=FOLDER of each adapter on the model, or one FOLDER.
      adapter: name of the one that answers.
      param_dtype: dtype of the parameters; None is float32.
      images: what to change about the image processor.
      batch_size: questions answered together by a model on this machine.
      served_model: the model's name on a server; None is the only one that is there.
      concurrency: requests to a server at a time.
      tries: of a request, before it counts as failed.
      timeout: of a request in seconds.
      key_variable: environment variable that holds the server's key.
      box_form: how a model behind a server writes boxes.
      box_space: in which space its numbers are; None is that of --box_form.
      judge: http://HOST:PORT/v1 of a server whose model judges answers, for tasks whose published scores are judged.
      judge_model: the judge's name there; None is the only model.
      training: training data in which the tasks' questions are looked for, by words and by pictures.
      report: output folders of models to write one page about, beside --output.
      elo: output folders of models that a judge is to compare pair by pair; the page has their ratings.
    """

    model: str | None = None
    tasks: tuple[str, ...] = ()
    data: str | None = None
    output: str | None = None
    list: bool = False
    include: tuple[str, ...] = ()
    limit: int | None = None
    style: Literal["task", "boxed"] = "task"
    runs: int | None = None
    shots: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    rescore: bool = False
    compare: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    adapter: str | None = None
    param_dtype: Literal["float32", "bfloat16"] | None = None
    images: Annotated[ImageOptions, FLAT] = ImageOptions()
    batch_size: int = 8
    served_model: str | None = None
    concurrency: int = 16
    tries: int = 5
    timeout: float = 600.0
    key_variable: str = "OPENAI_API_KEY"
    box_form: FormatName = "json"
    box_space: CoordinateSpace | None = None
    judge: str | None = None
    judge_model: str | None = None
    training: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    elo: tuple[str, ...] = ()


def run(words: list[str]) -> int:
    options = parse(Evaluate, words, "jvlm evaluate")
    return evaluate(options)


def evaluate(options: Evaluate) -> int:
    """Do what the options say. Returns the exit status."""
    from jvlm.evaluation import registry

    if options.compare:
        return _compare(options)
    known = registry.tasks(options.include)
    if options.list:
        print(registry.listing(known))
        return 0
    if options.output is None:
        raise UserError("give --output DIR, for answers and scores")
    if options.elo or options.report:
        return _page(options)
    return _rescore(options, known) if options.rescore else _ask(options, known)


def _ask(options: Evaluate, known) -> int:
    from jvlm.evaluation import registry
    from jvlm.evaluation.run import Settings, check, evaluate, table

    tasks = registry.choose(options.tasks, known)
    if options.model is None or options.data is None:
        raise UserError("give --model and --data; or --rescore for answers that are there")
    _check_options(options)
    given = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p")}
    decoding = {name: value for name, value in given.items() if value is not None}
    settings = Settings(options.limit, options.style, options.runs, options.shots, decoding)
    data, output = Path(options.data), Path(options.output)
    # before a model is loaded, which takes long
    try:
        check(tasks, data, output, settings, training=options.training)
    except UserError as error:
        raise UserError(str(error).replace("sampling.", "--", 1)) from error
    judge = judge_of(options)
    records = evaluate(client(options), tasks, data, output, settings, judge=judge, training=options.training)
    print(table(records))
    _report(options, [options.output])
    return 0


_OF_SERVERS = ("served_model", "box_form", "box_space")
_OF_MODELS = ("adapters", "adapter", "param_dtype", "images")


def _check_options(options: Evaluate) -> None:
    """Raise UserError for numbers out of range, and for options that the kind of model does not take."""
    for name in ("limit", "runs", "shots", "max_new_tokens", "batch_size", "concurrency", "tries"):
        value, least = getattr(options, name), 0 if name == "shots" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if not 0 < options.timeout < math.inf:
        raise UserError(f"--timeout is {options.timeout}; it must be a positive number of seconds")
    defaults, is_server = Evaluate(), options.model.startswith(SERVERS)
    for name in _OF_MODELS if is_server else _OF_SERVERS:
        if getattr(options, name) != getattr(defaults, name):
            wanted = "a model on this machine" if is_server else "a server"
            shown = "max_pixels and other limits of images are" if name == "images" else f"--{name} is"
            raise UserError(f"{shown} for {wanted}, and --model is {options.model}; leave it out")
    names = [word.partition("=")[0] for word in options.adapters if "=" in word]
    if options.adapter is not None and options.adapter not in names:
        raise UserError(f"--adapter {options.adapter}: none of --adapters has that name; there are {names}")


def _rescore(options: Evaluate, known) -> int:
    from jvlm.evaluation import registry
    from jvlm.evaluation.metrics import verifier
    from jvlm.evaluation.run import score_task, table
    from jvlm.evaluation.store import SETTINGS

    output = Path(options.output)
    there = sorted(path.parent.name for path in output.glob(f"*/{SETTINGS}"))
    if not there:
        raise UserError(f"{output} holds no answers to score; ask a model first, with --model")
    names, unknown = options.tasks or tuple(there), [name for name in there if name not in known]
    if unknown and not options.tasks:
        fix = "give their file with --include, or name those to score with --tasks"
        raise UserError(f"{output} holds answers to {', '.join(unknown)}, which are no tasks here; {fix}")
    with verifier():
        records = [
            score_task(task, output / task.name, judge=judge_of(options)) for task in registry.choose(names, known)
        ]
    print(table(records))
    _report(options, [options.output])
    return 0


def _page(options: Evaluate) -> int:
    """Write a page about several models, with ratings if a judge is to make them."""
    if not options.elo:
        _report(options, options.report)
        return 0
    from jvlm.evaluation.duels import duels, record
    from jvlm.evaluation.store import write_json, write_lines

    judge = judge_of(options)
    if judge is None:
        raise UserError("--elo needs a judge: --judge http://HOST:PORT/v1")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    judged = duels({Path(folder).name: Path(folder) for folder in options.elo}, judge)
    write_lines(output / "duels.jsonl", map(dataclasses.asdict, judged))
    values = record(judged, judge)
    write_json(output / "elo.json", values)
    for name, one in sorted(values["ratings"].items(), key=lambda pair: -pair[1]["value"]):
        print(f"{name:<26} {one['value']:7.0f}  {one['low']:.0f} - {one['high']:.0f}")
    if values["without_result"]:
        print(f"{values['without_result']} of {values['duels']} duels have no result: {output / 'duels.jsonl'}")
    _report(options, options.elo, elo=values, duels=judged)
    return 0


def _report(options: Evaluate, folders, **content) -> None:
    from jvlm.evaluation.page import model_of, render, write_page

    output = Path(options.output)
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"two folders have the name {max(names, key=names.count)}; give each model's its own")
    models = [model_of(name, Path(folder)) for name, folder in zip(names, folders, strict=True)]
    output.mkdir(parents=True, exist_ok=True)
    write_page(output / "report.html", render(models, **content))
    print(f"report: {output / 'report.html'}")


def judge_of(options: Evaluate):
    """Return the judge of the options; None without one."""
    if options.judge is None:
        return None
    from jvlm.evaluation.judges import Judge

    asked = dataclasses.replace(options, model=options.judge, served_model=options.judge_model)
    return Judge(endpoint(asked, "--judge_model"), Path(options.output) / "judge.jsonl")


def _compare(options: Evaluate) -> int:
    from jvlm.evaluation.comparison import compare_folders, table

    if len(options.compare) != 2:
        raise UserError(f"--compare takes two output folders, got {len(options.compare)}")
    print(table(compare_folders(Path(options.compare[0]), Path(options.compare[1]))))
    return 0


def client(options: Evaluate) -> Client:
    """Return who answers."""
    from jvlm.evaluation.clients import Boxes, EndpointClient, LocalClient

    if options.model.startswith(SERVERS):
        boxes = Boxes(options.box_form, options.box_space)
        return EndpointClient(endpoint(options), boxes=boxes)
    chosen = ModelOptions(
        options.model, options.adapters, options.param_dtype, quantization=None, images=options.images, parallel=None
    )
    model, processor, layout = load(chosen)
    return LocalClient(
        model,
        processor,
        batch_size=options.batch_size,
        layout=layout,
        adapter=options.adapter,
        name=Path(options.model).name,
    )


def endpoint(options: Evaluate, named_with: str = "--served_model"):
    """Return the server of --model. Raises UserError where it cannot be reached, or has several models.

    Args:
      named_with: the option that names its model.
    """
    from jvlm.evaluation.endpoint import Endpoint, EndpointError

    chosen = Endpoint(
        options.model,
        options.served_model or "",
        options.key_variable,
        options.concurrency,
        options.tries,
        options.timeout,
    )
    if options.served_model:
        return chosen
    try:
        names = dataclasses.replace(chosen, tries=1).models()
    except EndpointError as error:
        raise UserError(f"{error}. Is the server there? Its model can be named with {named_with}") from error
    if len(names) != 1:
        raise UserError(f"{options.model} has {len(names)} models ({', '.join(names[:8])}); name one: {named_with}")
    return dataclasses.replace(chosen, model=names[0])
