"""The command line: ``jvlm train | replay | generate | chat | data check | data shard``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import os
import sys
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from jvlm import configs, host_memory
from jvlm.data.errors import MISTAKES, RowError
from jvlm.errors import UserError
from jvlm.overrides import override

if TYPE_CHECKING:
    from jvlm.data.pipeline import DataConfig
    from jvlm.data.processor import Processor
    from jvlm.data.vision import MediaConfig

_OF_THE_USER = (*MISTAKES, KeyboardInterrupt)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of the user's making are one message, not a traceback.

    0 done; 2 a mistake to mend; 3 done, but the scores are below an aim of the experiment; 75 training was asked to
    stop (SIGTERM, Ctrl-C, preemption), has saved, and goes on with the same command; 130 a second Ctrl-C, and
    nothing is saved; 141 nobody reads the output any more.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_fields", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _print_anything()
    try:
        return arguments.run(arguments, rest)
    except BrokenPipeError:
        # whoever read the output has seen enough; closing it at the end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _OF_THE_USER as error:
        if arguments.traceback:
            raise
        return _say(error)


def _print_anything() -> None:
    """Escape what the terminal's encoding lacks; without this such a character ends an answer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(error: BaseException) -> int:
    """Print an error as its user should see it; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("\njvlm: interrupted; run the same command to go on", file=sys.stderr)
        return 130
    print(f"jvlm: {error}", file=sys.stderr)
    return 2


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    host_memory.keep_freed_memory()
    import jax

    from jvlm import job
    from jvlm.evaluation import aim
    from jvlm.parallel import hosts
    from jvlm.training.interruption import EXIT_STATUS, Interrupted

    if arguments.distributed == "true" or arguments.coordinator:
        hosts.initialise(arguments.coordinator, arguments.num_processes, arguments.process_id)
    try:
        job.run(configs.load(arguments.config, rest))
    except Interrupted as stopped:
        print(f"jvlm: {stopped}", file=sys.stderr)
        return EXIT_STATUS
    except aim.AimMissed as missed:
        if hosts.is_rank0():
            print(f"jvlm: aim missed: {missed}", file=sys.stderr)
        return aim.EXIT_STATUS
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        elsewhere = isinstance(error, hosts.PeerFailed)
        known = isinstance(error, _OF_THE_USER) or elsewhere
        if arguments.traceback or not known:
            traceback.print_exc()
        status = _say(error) if known else 1
        # a mistake is one on every process: whoever starts them again must not, whichever ends first
        hosts.abort(1 if elsewhere and not error.is_user_error else status)
    return 0


def _replay(arguments: argparse.Namespace, _: list[str]) -> int:
    from jvlm.training.replay import replay

    for line in replay(Path(arguments.folder)):
        print(line, flush=True)
    return 0


def _sampling(arguments: argparse.Namespace):
    from jvlm.inference.sampling import SamplingConfig

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        return SamplingConfig(**given)
    except UserError as error:
        raise UserError(str(error).replace("sampling.", "--", 1)) from error


def _check_fields(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Raise UserError for what is no option of a command; ``--parallel.*`` are read later."""
    command, internal = arguments.command, ("run", "command", "takes_fields", "traceback")
    options = [f"--{name}" for name in vars(arguments) if name not in internal]
    for field in fields:
        name = field.partition("=")[0]
        if name.startswith("--") and not name.startswith("--parallel"):
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"jvlm {command} --help lists them"
            raise UserError(f"jvlm {command} has no option {name}; {hint}")
    if fields and not fields[0].startswith("--"):
        raise UserError(f"jvlm {command} takes options only, and {fields[0]!r} belongs to none")


def _load(arguments: argparse.Namespace, fields: list[str]):
    """(model, processor, layout): on all devices, or on the mesh that ``fields`` ask for as --parallel.tensor 4."""
    from jvlm.inference import serving
    from jvlm.weights import loading, run_folder

    folder = run_folder.local(arguments.model)
    config = loading.read_config(folder)
    if arguments.param_dtype:
        precision = dataclasses.replace(config.precision, param_dtype=arguments.param_dtype)
        config = dataclasses.replace(config, precision=precision)
    asked = override(serving.Serving(), fields, f"jvlm {arguments.command}").parallel
    layout = serving.layout(config, asked if fields else None)
    place = layout.parameter if layout else None
    model, processor = loading.load(folder, precision=config.precision, sharding=place)
    processor.media = _media(arguments, processor.media)
    return model, processor, layout


def _media(arguments: argparse.Namespace, media: MediaConfig) -> MediaConfig:
    """The media settings with the limits that were typed. Raises UserError naming the option."""
    limits = {n: getattr(arguments, n) for n in ("min_pixels", "max_pixels") if getattr(arguments, n) is not None}
    known = {f.name for f in dataclasses.fields(media)}
    for name, value in limits.items():
        if name not in known:
            raise UserError(f"--{name} is not for this model; its pictures have {', '.join(sorted(known))}")
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    media = dataclasses.replace(media, **limits)
    if limits and media.min_pixels > media.max_pixels:
        raise UserError(f"--min_pixels is {media.min_pixels}, above --max_pixels {media.max_pixels}")
    return media


def _generate(arguments: argparse.Namespace, rest: list[str]) -> int:
    from jvlm.data.shards import RowSource
    from jvlm.inference import answer_file

    _check_fields(arguments, rest)
    file = arguments.data is not None
    if (arguments.prompt is not None) == file or file != (arguments.output is not None):
        raise UserError("give either --prompt (with any number of --image), or --data and --output")
    if file and arguments.image:
        raise UserError("--image goes with --prompt; the rows of --data name their own pictures")
    if not file and not arguments.prompt.strip() and not arguments.image:
        raise UserError("--prompt is empty; ask something, or give an --image")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size is {arguments.batch_size}; it must be at least 1")
    sampling = _sampling(arguments)
    if file:
        # before the model is loaded, which takes long
        answer_file.check_paths(arguments.data, arguments.output)
        RowSource([arguments.data])
    model, processor, layout = _load(arguments, rest)
    if not file:
        return _answer_prompt(arguments, model, processor, layout, sampling)
    from jvlm.inference.batch_file import generate_file

    generate_file(
        model,
        processor,
        arguments.data,
        arguments.output,
        sampling,
        batch_size=arguments.batch_size,
        on_bad_row=arguments.on_bad_row,
        layout=layout,
        accept_changes=arguments.accept_changes,
    )
    return 0


def _answer_prompt(arguments: argparse.Namespace, model, processor, layout, sampling) -> int:
    from jvlm.inference.generate import encode_prompt, engine_for, stream_example

    lacking = len(arguments.image) - arguments.prompt.count("<image>")
    content = "<image>" * max(lacking, 0) + arguments.prompt
    row = {"messages": [{"role": "user", "content": content}], "images": arguments.image}
    engine = engine_for(model, processor, layout)
    try:
        pieces = stream_example(engine, encode_prompt(engine, row), sampling)
    except RowError as error:
        # the row is made here, so its fields mean nothing to the user
        index = error.field.removeprefix("images[").removesuffix("]")
        option = f"--image {arguments.image[int(index)]}" if index.isdigit() else "--prompt"
        option = "--image" if error.field == "images" else option
        raise UserError(f"{option}: {error.problem}. {error.fix}") from error
    note = _show(pieces)
    print()
    if note:
        print(f"jvlm: {note}", file=sys.stderr)
    return 0


def _show(pieces: Generator[str, None, str | None]) -> str | None:
    """Print pieces as they come; returns what is to be said at the end."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def _chat(arguments: argparse.Namespace, rest: list[str]) -> int:
    from jvlm.inference.chat import chat

    _check_fields(arguments, rest)
    sampling = _sampling(arguments)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the chat says what is wrong with a line, and goes on
    model, processor, layout = _load(arguments, rest)
    chat(model, processor, sampling, arguments.system, layout=layout)
    return 0


def _check(arguments: argparse.Namespace, rest: list[str]) -> int:
    from jvlm.data.check import check
    from jvlm.data.rejections import writing

    status = 0
    runs = _data_to_check(arguments, rest)
    files = [pattern for _, data, _, _ in runs for pattern in data.train]
    with writing(arguments.output, files, verbose=arguments.verbose) as on_rejected:
        for name, data, processor, seed in runs:
            report = check(data.train, processor, data, seed=seed, on_rejected=on_rejected)
            print(f"{name}:\n{report.text()}" if len(runs) > 1 else report.text(), flush=True)
            status = 1 if report.usable < report.rows else status
    return status


def _data_to_check(arguments: argparse.Namespace, rest: list[str]) -> list[tuple[str, DataConfig, Processor, int]]:
    """(name, configuration, processor, seed) of the data to check: of files, or of each stage of an experiment."""
    from jvlm.data.pipeline import DataConfig
    from jvlm.training import loop, processors

    files, fields = _files_and_fields(rest)
    given = {"train": tuple(files)} if files else {}
    given |= {"media_root": arguments.media_root} if arguments.media_root else {}
    if arguments.config is None:
        # on the command line the fields are called as in training
        wrapped = dataclasses.make_dataclass("Check", [("data", DataConfig, DataConfig())], frozen=True)
        runs = [("data", override(wrapped(), fields, "jvlm data check FILE ...").data, 0)]
        processor = _processor(arguments.model)
    else:
        experiment = configs.load(arguments.config, fields)
        chosen = [experiment] if files else loop.runs_of(experiment)
        runs = [(run.name, run.data, run.seed) for run in chosen]
        processor = _processor(arguments.model) or processors.of_experiment(experiment)
    runs = [(name, dataclasses.replace(data, **given), processor, seed) for name, data, seed in runs]
    if not all(data.train for _, data, _, _ in runs):
        raise UserError("no data to check: give files, or a --config that names them as data.train")
    return runs


def _files_and_fields(rest: list[str]) -> tuple[list[str], list[str]]:
    """Files of rows, and fields with their values, which argparse cannot tell apart: it knows no field."""
    from jvlm.data.shards import SHARD_SUFFIX

    files, fields, last = [], [], ""
    for word in rest:
        if word.startswith("--"):
            last = word
        # a field takes one value, or some more that are no rows; --data.train takes files itself
        has_value = "=" in last or (bool(fields) and fields[-1] != last and word.endswith((".jsonl", SHARD_SUFFIX)))
        is_file = not word.startswith("--") and (not last or (has_value and not last.endswith((".train", ".data"))))
        (files if is_file else fields).append(word)
    return files, fields


def _shard(arguments: argparse.Namespace, _: list[str]) -> int:
    from jvlm.data.check import shard

    print(shard(arguments.files, arguments.output, arguments.rows_per_shard, media_root=arguments.media_root))
    return 0


def _processor(model: str | None) -> Processor | None:
    from jvlm.training import processors

    return None if model is None else processors.load(model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jvlm", description="Train, run and export vision-language models in JAX.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, score, export and report an experiment", add_help=False)
    train.add_argument("config", help="a Python file with get_config(), or its name under configs/")
    train.add_argument(
        "--distributed", choices=("true", "false"), help="join the processes of a TPU pod or a SLURM job"
    )
    train.add_argument("--coordinator", help="host:port of process 0, where nothing announces it")
    train.add_argument("--num_processes", type=int, help="how many there are (with --coordinator)")
    train.add_argument("--process_id", type=int, help="which one this is, from 0 (with --coordinator)")
    train.set_defaults(run=_train, takes_fields=True)

    replay = commands.add_parser("replay", help="say which tower and which conversation of a stopped run is not finite")
    replay.add_argument("folder", help="<run>/nonfinite/FIRST-LAST, as the run named it")
    replay.set_defaults(run=_replay)

    generate = commands.add_parser("generate", help="answer one prompt, or every row of a JSONL file")
    _add_model(generate)
    generate.add_argument("--prompt", help="the question; <image> tags say where pictures go (default: in front)")
    generate.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    generate.add_argument("--data", help="JSONL of rows to answer")
    generate.add_argument("--output", help="JSONL to write; an unfinished one is continued")
    generate.add_argument("--batch_size", type=int, default=8)
    generate.add_argument("--on_bad_row", choices=("error", "skip"), default="error")
    generate.add_argument(
        "--accept_changes",
        action="store_true",
        help="go on with an --output that was begun with another model, data or sampling",
    )
    generate.set_defaults(run=_generate, takes_fields=True, command="generate")

    chat = commands.add_parser("chat", help="talk with a model in the terminal")
    _add_model(chat)
    chat.add_argument("--system", help="system prompt")
    chat.set_defaults(run=_chat, takes_fields=True, command="chat")

    data = commands.add_parser("data", help="look at data, or write shards").add_subparsers(required=True)
    usage = "jvlm data check FILE ... [--model DIR] [--config CONFIG] [--data.FIELD VALUE ...] [options]"
    check = data.add_parser("check", help="count rows that can and cannot be used, and say why", usage=usage)
    check.add_argument("--model", help="folder whose tokenizer and pixel limits to count tokens with")
    check.add_argument("--config", help="check as this experiment would train: a Python file, or a name under configs/")
    check.add_argument("--media_root", help="folder for relative picture paths, after the data file's own")
    check.add_argument("--verbose", action="store_true", help="print every rejected row")
    check.add_argument("--output", help="JSONL to write every rejected row to")
    check.epilog = (
        "FILE: JSONL or ArrayRecord files or globs; without any, the data of --config and of its stages. Fields of the "
        "training's data apply, as --data.row_tokens 2048; with --config, all fields of the experiment."
    )
    check.set_defaults(run=_check, takes_fields=True)
    shard = data.add_parser("shard", help="write rows and their pictures as ArrayRecord shards")
    shard.add_argument("files", nargs="+")
    shard.add_argument("--output", required=True, help="folder")
    shard.add_argument("--rows_per_shard", type=int, default=10_000)
    shard.add_argument("--media_root", help="folder for relative picture paths, after the data file's own")
    shard.set_defaults(run=_shard)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "All devices share the work; --parallel.tensor, --parallel.data and others of `parallel` say how."
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a jvlm run folder")
    parser.add_argument("--param_dtype", choices=("float32", "bfloat16"), help="of the parameters (default: float32)")
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 (default) takes the most likely token")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--repetition_penalty", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--min_pixels", type=int, help="smallest picture after resizing (default: the model's)")
    parser.add_argument("--max_pixels", type=int, help="largest picture after resizing (default: the model's)")


if __name__ == "__main__":
    sys.exit(main())
