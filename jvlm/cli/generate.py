"""``jvlm generate``: answers to one prompt, or to a file of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator
from typing import Annotated, Literal

from tyro.conf import UseAppendAction

from jvlm.cli.model import ModelOptions, load, parse_model_command
from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.options import FLAT


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer one prompt, or every line of a JSONL file.

    Attributes:
      model: the model that answers, how, and on which devices.
      prompt: the question; <image> tags say where images go, and without tags they come first.
      image: an image of the prompt; may be repeated.
      data: JSONL file of conversations to answer.
      output: JSONL file to write; an unfinished one is continued.
      adapter: the one of ``adapters`` that answers --prompt; lines of --data name theirs in a field "adapter".
      batch_size: conversations answered together.
      on_bad_example: stop at a line that cannot be read, or write its error in place of an answer.
      accept_changes: go on with an output that was begun with another model, data or sampling.
    """

    model: Annotated[ModelOptions, FLAT]
    prompt: str | None = None
    image: UseAppendAction[tuple[str, ...]] = ()
    data: str | None = None
    output: str | None = None
    adapter: str | None = None
    batch_size: int = 8
    on_bad_example: Literal["error", "skip"] = "error"
    accept_changes: bool = False


def run(words: list[str]) -> int:
    options = parse_model_command(Generate, words, "jvlm generate")
    _check(options)
    return _answer_prompt(options) if options.data is None else _answer_file(options)


def _check(options: Generate) -> None:
    file = options.data is not None
    if (options.prompt is not None) == file or file != (options.output is not None):
        raise UserError("give either --prompt (with any number of --image), or --data and --output")
    if file and options.adapter is not None:
        raise UserError('--adapter goes with --prompt; the lines of --data name theirs in a field "adapter"')
    if file and options.image:
        raise UserError("--image goes with --prompt; the lines of --data name their own images")
    if not file and not options.prompt.strip() and not options.image:
        raise UserError("--prompt is empty; ask something, or give an --image")
    if options.batch_size < 1:
        raise UserError(f"--batch_size is {options.batch_size}; it must be at least 1")


def _answer_file(options: Generate) -> int:
    from jvlm.data.example_source import ExampleSource
    from jvlm.inference import answer_file
    from jvlm.inference.batch_file import generate_file

    # before the model is loaded, which takes long
    answer_file.check_paths(options.data, options.output)
    ExampleSource([options.data])
    model, processor, layout = load(options.model)
    generate_file(
        model,
        processor,
        options.data,
        options.output,
        options.model.sampling,
        batch_size=options.batch_size,
        on_bad_example=options.on_bad_example,
        layout=layout,
        accept_changes=options.accept_changes,
    )
    return 0


def _answer_prompt(options: Generate) -> int:
    from jvlm.inference.generate import encode_prompt, engine_for, stream_example

    model, processor, layout = load(options.model)
    lacking = len(options.image) - options.prompt.count("<image>")
    content = "<image>" * max(lacking, 0) + options.prompt
    example = {"messages": [{"role": "user", "content": content}], "images": list(options.image)}
    engine = engine_for(model, processor, layout)
    try:
        pieces = stream_example(engine, encode_prompt(engine, example), options.model.sampling, options.adapter)
    except ExampleError as error:
        # the example is made here, so its fields mean nothing to the user
        index = error.field.removeprefix("images[").removesuffix("]")
        option = f"--image {options.image[int(index)]}" if index.isdigit() else "--prompt"
        option = "--image" if error.field == "images" else option
        raise UserError(f"{option}: {error.problem}. {error.fix}") from error
    note = _show(pieces)
    print()
    if note:
        print(f"jvlm: {note}", file=sys.stderr)
    return 0


def _show(pieces: Generator[str, None, str | None]) -> str | None:
    """Print pieces as they come; returns the note that ends them."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value
