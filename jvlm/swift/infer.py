"""``jvlm infer``: answers to what a run held out, to files, or to a person in the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.processor import Processor
from jvlm.data.subset import Subset
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.feed import Asked, answer_each, answer_text, encode_prompt, in_order
from jvlm.inference.generate import engine_for, stream_example
from jvlm.inference.sampling import SamplingConfig
from jvlm.progress import Progress
from jvlm.swift import checkpoint_model, results, saved
from jvlm.swift.checkpoint_model import Checkpoint
from jvlm.swift.columns import source_of
from jvlm.swift.experiment import processor_config
from jvlm.swift.infer_arguments import AnswerArguments, InferArguments
from jvlm.training.side_files import read_json
from jvlm.training.validation_split import SPLIT

_TOKENS = 2048
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def infer(arguments: InferArguments) -> Path | None:
    """Answer, and return the file of answers; None after a conversation in the terminal.

    Raises:
      UserError: no such model or data; a file that holds other answers.
    """
    answers = arguments.answers
    checkpoint = find(arguments)
    source = data_of(answers, checkpoint)
    examples = None if source is None else [source[index] for index in range(len(source))]
    path = None if examples is None else Path(answers.result_path or _result_path(checkpoint))
    # before the model is loaded, which takes long
    file = None if path is None else results.ResultFile(path, [example for _, example in examples])
    model, processor, layout = checkpoint_model.load(checkpoint, arguments.model.torch_dtype)
    processor = _processor(arguments, processor, checkpoint)
    sampling = sampling_of(answers, processor.generation)
    if file is None:
        from jvlm.inference.chat import chat

        chat(model, processor, sampling, arguments.model.system, layout=layout)
        return None
    engine = engine_for(model, processor, layout, answers.max_batch_size)
    answer(engine, examples, file, sampling, batch_size=answers.max_batch_size, stream=bool(answers.stream))
    if answers.metric == "acc":
        right, asked = file.accuracy()
        print(f"acc: {right / asked:.4f} ({right} of {asked})" if asked else "acc: no example has an expected answer")
    print(f"{len(file.lines)} answers are in {file.path}")
    return file.path


def find(arguments: InferArguments) -> Checkpoint:
    """Return the model that answers. Raises UserError where it is not clear which."""
    named = [*arguments.answers.adapters, *([arguments.answers.ckpt_dir] if arguments.answers.ckpt_dir else [])]
    if len(named) > 1:
        raise UserError(
            f"give one checkpoint, got {', '.join(named)}; jvlm generate --model DIR --adapters a=DIR b=DIR answers "
            'with several, each line of --data with the one that its field "adapter" names'
        )
    if named and "=" in named[0] and not Path(named[0]).exists():
        raise UserError(f"--adapters {named[0]}: jvlm infer takes a folder without a name in front of it")
    return checkpoint_model.find(named[0] if named else None, arguments.model.model)


def data_of(answers: AnswerArguments, checkpoint: Checkpoint) -> ExampleSource | Subset | None:
    """Return the examples to answer; None if there are none, for a conversation in the terminal.

    Raises:
      UserError: the run of the checkpoint validated on nothing.
    """
    if answers.val_dataset:
        return source_of(answers.val_dataset, answers.columns)
    if not answers.load_data_args:
        return None
    values = saved.read(checkpoint.folder)
    if values["val_dataset"]:
        return source_of(values["val_dataset"], values.get("columns"))
    path = checkpoint.folder.parent / SPLIT
    split = read_json(path, "give --val_dataset")
    if split is None:
        raise UserError(
            f"--load_data_args true: the run of {checkpoint.folder} held nothing out ({path} is not there). Give "
            "--val_dataset, or train with --split_dataset_ratio 0.01"
        )
    source = source_of(values["dataset"], values.get("columns"))
    if source.counts() != split["counts"]:
        raise UserError(
            f"--load_data_args true: {', '.join(values['dataset'])} has changed since the run held examples out of it "
            f"(then {split['counts']}, now {source.counts()}); give --val_dataset"
        )
    return Subset(source, split["validation"])


def sampling_of(answers: AnswerArguments, generation: dict[str, Any]) -> SamplingConfig:
    """Return how answers are drawn: as the arguments say, else as generation_config.json does."""
    greedy = not generation.get("do_sample", False)
    values = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    if greedy:
        values |= {"temperature": 0.0}
    values |= {name: getattr(answers, name) for name in _SAMPLING if getattr(answers, name) is not None}
    return SamplingConfig(max_new_tokens=answers.max_new_tokens or _TOKENS, seed=answers.seed, **values)


def answer(
    engine: Engine,
    examples: Sequence[tuple[Origin, Any]],
    file: results.ResultFile,
    sampling: SamplingConfig,
    *,
    batch_size: int,
    stream: bool,
) -> None:
    """Answer the examples that the file has no line of, and write a line for each."""
    begun = len(file.lines)
    if begun:
        print(f"{file.path}: {begun} of {len(examples)} answers are there already")
    if batch_size < 1:
        raise UserError(f"--max_batch_size must be at least 1, got {batch_size}")
    with Progress(total=len(examples), initial=begun, desc="answering", unit="example") as bar:
        if stream:
            for number in range(begun, len(examples)):
                file.append(_streamed(engine, *examples[number], sampling))
                bar.update()
        else:
            for written in _lines(engine, examples, begun, sampling, batch_size):
                file.append(written)
                bar.update()
    wrong = sum("error" in found for found in file.lines)
    if wrong:
        print(f"{wrong} examples could not be answered; their lines have the field error", file=sys.stderr)


def _lines(
    engine: Engine, examples: Sequence[tuple[Origin, Any]], begun: int, sampling: SamplingConfig, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield the lines of the examples from a number on, in order."""
    asked = (Asked(number, examples[number][1], examples[number][0]) for number in range(begun, len(examples)))
    outcomes = answer_each(engine, asked, sampling, batch_size=batch_size)
    with contextlib.closing(outcomes):
        for outcome in in_order(outcomes, begun):
            record, error = outcome.asked.conversation, outcome.error
            if isinstance(error, ExampleError):
                yield results.error_line(record, str(error))
            elif error is not None:
                raise error
            else:
                yield results.line(record, answer_text(engine.processor, outcome.completion))


def _streamed(engine: Engine, origin: Origin, example: Any, sampling: SamplingConfig) -> dict[str, Any]:
    """Print an answer as it comes. Returns its line."""
    try:
        if isinstance(example, ExampleError):
            raise example
        prompt = encode_prompt(engine, example, origin)
    except ExampleError as error:
        return results.error_line(example, str(error))
    pieces = []
    for piece in stream_example(engine, prompt, sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return results.line(example, "".join(pieces))


def _processor(arguments: InferArguments, processor: Processor, checkpoint: Checkpoint) -> Processor:
    """Return the processor with what was typed about it, looking for images where the run did."""
    config = processor_config(arguments.model, processor.config)
    roots = processor.media_roots
    root = saved.read(checkpoint.folder).get("media_root") if arguments.answers.load_data_args else None
    roots = (*roots, root) if root else roots
    return Processor(processor.tokenizer, processor.model, config, media_roots=roots, generation=processor.generation)


def _result_path(checkpoint: Checkpoint) -> Path:
    return checkpoint.local_name / "infer_result" / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
