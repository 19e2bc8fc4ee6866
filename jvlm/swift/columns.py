"""ms-swift's --columns, a JSON object of old and new names, as `DataConfig.columns` has them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jvlm.data.example_source import ExampleSource
from jvlm.data.formats.example_format import FormatOptions
from jvlm.errors import UserError

_EXAMPLE = """--columns '{"question": "query", "raw": "_"}'"""


def columns_of(text: str | None) -> tuple[str, ...]:
    """Return "FROM=TO" for each entry of a JSON object. Raises UserError for another text."""
    if text is None:
        return ()
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--columns {text} is not JSON ({error}); write for example {_EXAMPLE}") from error
    if not isinstance(names, dict) or not all(isinstance(new, str) and new for new in names.values()):
        raise UserError(f"--columns {text} is not an object of old and new names; write for example {_EXAMPLE}")
    return tuple(f"{old}={new}" for old, new in names.items())


def source_of(files: Sequence[str], columns: str | None) -> ExampleSource:
    """Return the examples of files whose columns are renamed. Raises as `ExampleSource`."""
    return ExampleSource(files, FormatOptions(columns=columns_of(columns)))
