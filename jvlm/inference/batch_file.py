"""A JSONL file of examples in, a JSONL file of answers out; an unfinished output is continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.answer_file import HASH, AnswerFile, Run, check_paths, copied
from jvlm.inference.engine import Engine
from jvlm.inference.generate import (
    Completion,
    adapter_name,
    answer_text,
    check_batch_size,
    complete_each,
    cut_note,
    encode_prompt,
    engine_for,
)
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.settings import answer_settings, files_hash, settings_hash
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.progress import Progress
from jvlm.weights.finite import BrokenWeights


@dataclasses.dataclass(frozen=True)
class FileResult:
    """Examples of an output file: answered and left unanswered for an error in this call, and answered before it."""

    answered: int
    bad: int
    existing: int


def generate_file(
    model: VLM,
    processor: Processor,
    data: str | Path,
    output: str | Path,
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 8,
    on_bad_example: Literal["error", "skip"] = "error",
    layout: MeshLayout | None = None,
    accept_changes: bool = False,
) -> FileResult:
    """Answer every example of a JSONL file.

    Output line n is input example n with ``response``, ``prompt_tokens``, ``response_tokens`` (a stop token included)
    and ``finish`` ("stop" or "length") added; or with ``error`` for a bad example, if ``on_bad_example`` is "skip"; and
    with ``settings_hash``. Fields of the example that have these names are replaced. Each batch is written when done.

    If the output exists, its lines are kept, a half-written last one is cut, and the examples after them are answered;
    random draws depend on the example, not on where a restart fell. A file beside it, ``<output>.meta.json``, holds the
    settings behind each ``settings_hash``: the model's weights and configuration, the processor's settings, the
    sampling and the data. They must be those of before.

    Args:
      layout: as in `jvlm.generate`.
      accept_changes: go on although settings have changed since the lines that are there; both are then recorded.

    Raises:
      ExampleError: a bad example, unless skipped; answers before it are in the file.
      UserError: an output that is the data, that is not the answers to it with these settings, that another run writes,
        or that cannot be written; a bad argument. Existing files are as they were.
    """
    check_batch_size(batch_size)
    if on_bad_example not in ("error", "skip"):
        raise UserError(f"on_bad_example is {on_bad_example!r}; it must be 'error' or 'skip'")
    files = check_paths(data, output)
    source = ExampleSource([str(data)])
    engine = engine_for(model, processor, layout, batch_size)
    settings = answer_settings(model, engine, sampling)
    mark, folder = settings_hash(settings), str(processor.tokenizer.name_or_path)
    run = Run(mark, settings, files_hash(files), len(source), folder)
    answered = bad = cut = 0
    with AnswerFile.opened(Path(output)) as file:
        done = file.resume(source, data, run, accept_changes=accept_changes)
        with Progress(total=len(source), initial=done.lines, desc="answering", unit="example") as bar:
            for start in range(done.lines, len(source), batch_size):
                request_ids = range(start, min(start + batch_size, len(source)))
                examples = [source[n] for n in request_ids]
                batch = _answer(engine, examples, request_ids, sampling, on_bad_example)
                file.append([line | {HASH: mark} for line in batch.lines])
                if batch.error is not None:
                    raise batch.error
                skipped = sum("error" in line for line in batch.lines)
                answered, bad, cut = answered + len(batch.lines) - skipped, bad + skipped, cut + batch.cut
                bar.update(len(batch.lines))
    wrong = f" ({done.errors} of them with an error)" if done.errors else ""
    existing = f"{done.lines} examples already done{wrong}"
    print(f"{output}: {answered} examples answered, {bad} bad examples, {existing}; {len(source)} in {data}")
    if cut:
        limit = model.config.decoder.max_position_embeddings
        print(f"{output}: {cut} answers end before max_new_tokens, at the model's {limit} positions")
    return FileResult(answered, bad, done.lines)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Output lines, the error of a bad example that ends them early, and how many answers the model's positions cut."""

    lines: list[dict[str, Any]]
    error: ExampleError | None
    cut: int


def _answer(
    engine: Engine,
    records: Sequence[tuple[Origin, Any]],
    request_ids: Sequence[int],
    sampling: SamplingConfig,
    on_bad_example: Literal["error", "skip"],
) -> _Batch:
    examples = [_encode(engine, origin, record) for origin, record in records]
    if on_bad_example == "error":
        # those behind a bad example are not answered in vain
        first = next((i for i, e in enumerate(examples) if isinstance(e, ExampleError)), len(examples))
        examples = examples[: first + 1]
    good = [i for i, e in enumerate(examples) if not isinstance(e, ExampleError)]
    names = [adapter_name(record) for _, record in records]
    answers = dict(zip(good, _complete(engine, examples, sampling, request_ids, good, names), strict=True))
    lines, cut = [], 0
    for i, example in enumerate(examples):
        answer, line = answers.get(i, example), copied(records[i][1])
        if isinstance(answer, ExampleError):
            if on_bad_example == "error":
                return _Batch(lines, answer, cut)
            lines.append(line | {"error": str(answer)})
            continue
        tokens, stopped = len(answer.tokens), answer.stopped
        cut += cut_note(engine, example, tokens, stopped, sampling) is not None
        line |= {
            "response": answer_text(engine.processor, answer),
            "prompt_tokens": example.length,
            "response_tokens": tokens,
            "finish": "stop" if stopped else "length",
        }
        lines.append(line)
    return _Batch(lines, None, cut)


def _complete(
    engine: Engine,
    examples: list[Example],
    sampling: SamplingConfig,
    request_ids: Sequence[int],
    chosen: list[int],
    adapters: Sequence[str | None],
) -> list[Completion | ExampleError]:
    """Answers to the chosen examples, or why there is none."""
    own, names = [request_ids[i] for i in chosen], [adapters[i] for i in chosen]
    prompts = [examples[i] for i in chosen]
    found: list[Completion | ExampleError] = []
    for prompt, one in zip(
        prompts, complete_each(engine, prompts, sampling, request_ids=own, adapters=names), strict=True
    ):
        if isinstance(one, BrokenWeights):
            raise one
        if isinstance(one, UserError):
            one = ExampleError(prompt.origin, "messages", f"no answer: {one}", "Leave the example out")
        found.append(one)
    return found


def _encode(engine: Engine, origin: Origin, example: Any) -> Example | ExampleError:
    if isinstance(example, ExampleError):
        return example
    try:
        return encode_prompt(engine, example, origin)
    except ExampleError as error:
        return error
