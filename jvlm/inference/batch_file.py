"""A JSONL file of rows in, a JSONL file of answers out; an unfinished output is continued."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jvlm.data.errors import Origin, RowError
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.data.rows import parse_row
from jvlm.data.shards import RowSource
from jvlm.inference.engine import Engine
from jvlm.inference.generate import answer_text, complete, engine_for
from jvlm.inference.sampling import SamplingConfig
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import Layout
from jvlm.progress import Progress

_ADDED = frozenset(("response", "prompt_tokens", "response_tokens", "finish", "error"))


@dataclasses.dataclass(frozen=True)
class FileResult:
    """Rows of an output file: answered and left unanswered for an error in this call, and found done already."""

    answered: int
    bad: int
    found: int


def generate_file(
    model: VLM,
    processor: Processor,
    data: str | Path,
    output: str | Path,
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 8,
    on_bad_row: Literal["error", "skip"] = "error",
    layout: Layout | None = None,
) -> FileResult:
    """Answer every row of a JSONL file.

    Output line n is input row n with ``response``, ``prompt_tokens``, ``response_tokens`` (a stop token included)
    and ``finish`` ("stop" or "length") added; or with ``error`` for a bad row, if ``on_bad_row`` is "skip". Every
    batch is written when it is done. If the output exists, its lines are kept, a half-written last one is cut, and
    the rows after them are answered; random draws depend on the row, not on where a restart fell. ``layout``: as in
    `jvlm.generate`.

    Raises:
      RowError: a bad row, unless skipped; answers before it are in the file.
      ValueError: an existing output that does not belong to the input, naming both, or a bad argument.
    """
    data, output = Path(data), Path(output)
    if data.suffix != ".jsonl":
        raise ValueError(f"{data}: give a *.jsonl file, of which each answer's line is a copy")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'")
    source = RowSource([str(data)])
    found = resume(source, data, output)
    engine = engine_for(model, processor, layout)
    answered = bad = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(output, "a", encoding="utf-8") as file,
        Progress(total=len(source), initial=found, desc="answering", unit="row") as bar,
    ):
        for start in range(found, len(source), batch_size):
            numbers = range(start, min(start + batch_size, len(source)))
            lines, error = _answer(engine, [source[n] for n in numbers], numbers, sampling, on_bad_row)
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            if error is not None:
                raise error
            skipped = sum("error" in line for line in lines)
            answered, bad = answered + len(lines) - skipped, bad + skipped
            bar.update(len(lines))
    print(f"{output}: {answered} rows answered, {bad} bad rows, {found} rows found done; {len(source)} in {data}")
    return FileResult(answered, bad, found)


def resume(source: RowSource, data: Path, output: Path) -> int:
    """The number of rows that the output holds already; cuts a half-written last line.

    Raises:
      ValueError: a line that is not the answer to the input's row of that number.
    """
    if not output.exists():
        return 0
    with open(output, "rb+") as file:
        whole = count = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            problem = _mismatch(line, source, count)
            if problem:
                raise ValueError(
                    f"{output}, line {count + 1}, {problem} of {data}. Give another output, or move this one away"
                )
            whole, count = whole + len(line), count + 1
        file.truncate(whole)
    return count


def _mismatch(line: bytes, source: RowSource, index: int) -> str | None:
    if index >= len(source):
        return f"has no row among the {len(source)}"
    try:
        written = json.loads(line)
    except ValueError:
        return f"is not JSON, so it is not an answer to row {index + 1}"
    _, row = source[index]
    asked = row if isinstance(row, dict) else {}
    if not isinstance(written, dict) or _without_answer(written) != _without_answer(asked):
        return f"is not an answer to row {index + 1}"
    return None


def _without_answer(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in _ADDED}


def _answer(
    engine: Engine,
    rows: Sequence[tuple[Origin, Any]],
    numbers: Sequence[int],
    sampling: SamplingConfig,
    on_bad_row: Literal["error", "skip"],
) -> tuple[list[dict[str, Any]], RowError | None]:
    """Output lines of a batch; with them the error of a bad row that ends it early."""
    examples: list[Example | RowError] = [_encode(engine.processor, origin, row) for origin, row in rows]
    stopper = None
    if on_bad_row == "error":
        first = next((i for i, e in enumerate(examples) if isinstance(e, RowError)), len(examples))
        stopper = examples[first] if first < len(examples) else None
        examples = examples[:first]
    good = [i for i, e in enumerate(examples) if not isinstance(e, RowError)]
    completions = complete(
        engine, [examples[i] for i in good], sampling, numbers=[numbers[i] for i in good], batch_size=max(len(good), 1)
    )
    lines = [dict(row) if isinstance(row, dict) else {} for _, row in rows[: len(examples)]]
    for i, completion in zip(good, completions, strict=True):
        lines[i] |= {
            "response": answer_text(engine.processor, completion),
            "prompt_tokens": examples[i].length,
            "response_tokens": len(completion.tokens),
            "finish": "stop" if completion.stopped else "length",
        }
    for line, example in zip(lines, examples, strict=True):
        if isinstance(example, RowError):
            line["error"] = str(example)
    return lines, stopper


def _encode(processor: Processor, origin: Origin, row: Any) -> Example | RowError:
    if isinstance(row, RowError):
        return row
    try:
        return processor.encode(parse_row(row, origin), generation_prompt=True)
    except RowError as error:
        return error
