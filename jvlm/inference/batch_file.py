"""A JSONL file of examples in, a JSONL file of answers out; an unfinished output is continued."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.answer_file import HASH, AnswerFile, Run, check_paths, copied
from jvlm.inference.engine import Engine
from jvlm.inference.feed import Asked, Outcome, answer_each, answer_text, in_order
from jvlm.inference.generate import adapter_name, check_batch_size, cut_note, engine_for
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
    with ``settings_hash``. Fields of the example that have these names are replaced. An answer
    is written once those before it are.

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

    def asked(first: int) -> Iterator[Asked]:
        for number in range(first, len(source)):
            origin, record = source[number]
            yield Asked(number, record, origin, adapter_name(record))

    with AnswerFile.opened(Path(output)) as file:
        done = file.resume(source, data, run, accept_changes=accept_changes)
        stops = on_bad_example == "error"
        outcomes = answer_each(engine, asked(done.lines), sampling, batch_size=batch_size, ends_at_error=stops)
        bar = Progress(total=len(source), initial=done.lines, desc="answering", unit="example")
        with bar, contextlib.closing(outcomes):
            for outcome in in_order(outcomes, done.lines):
                line = _line(engine, outcome, stops=stops)
                file.append([line | {HASH: mark}])
                wrong = outcome.error is not None
                answered, bad = answered + (not wrong), bad + wrong
                if not wrong:
                    tokens, stopped = line["response_tokens"], outcome.completion.stopped
                    cut += cut_note(engine, outcome.example, tokens, stopped, sampling) is not None
                bar.update()
    with_error = f" ({done.errors} of them with an error)" if done.errors else ""
    existing = f"{done.lines} examples already done{with_error}"
    print(f"{output}: {answered} examples answered, {bad} bad examples, {existing}; {len(source)} in {data}")
    if cut:
        limit = model.config.decoder.max_position_embeddings
        print(f"{output}: {cut} answers end before max_new_tokens, at the model's {limit} positions")
    return FileResult(answered, bad, done.lines)


def _line(engine: Engine, outcome: Outcome, *, stops: bool) -> dict[str, Any]:
    """Return the output line of an example, without its settings.

    Raises:
      ExampleError: a bad example, where one stops. BrokenWeights: the model's fault.
    """
    error, record = outcome.error, copied(outcome.asked.conversation)
    if isinstance(error, BrokenWeights):
        raise error
    if error is not None and not isinstance(error, ExampleError):
        error = ExampleError(outcome.asked.origin, "messages", f"no answer: {error}", "Leave the example out")
    if error is not None:
        if stops:
            raise error
        return record | {"error": str(error)}
    return record | {
        "response": answer_text(engine.processor, outcome.completion),
        "prompt_tokens": outcome.example.length,
        "response_tokens": len(outcome.completion.tokens),
        "finish": "stop" if outcome.completion.stopped else "length",
    }
