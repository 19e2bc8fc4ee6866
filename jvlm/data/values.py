"""Single values of an example: Arrow's nulls, numbers, text, and how an error shows what it was given."""

from __future__ import annotations

import math
import numbers
import reprlib
from typing import Any

import numpy as np

from jvlm.data.errors import ExampleError, Origin


def is_null(value: Any) -> bool:
    """Whether a value is null, or an object whose fields all are: so Arrow fills in a missing key or struct."""
    return value is None or (isinstance(value, dict) and bool(value) and all(v is None for v in value.values()))


def without_nulls(fields: dict) -> dict:
    """Return the fields of an object that hold something."""
    return {key: value for key, value in fields.items() if not is_null(value)}


def without_inner_nulls(value: Any) -> Any:
    """Return the value without the nulls of all objects in it, and without objects that hold nothing else."""
    if isinstance(value, dict):
        inner = {key: without_inner_nulls(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in inner.items() if item != {} or value[key] == {}}
    return [without_inner_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def number(value: Any) -> int | float | None:
    """Return a finite number as Python's own, numpy's included; None for anything else: true, "1", NaN, 10**400."""
    if type(value) is float:  # what nearly all are
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    plain = int(value) if isinstance(value, numbers.Integral) else float(value)
    try:
        return plain if math.isfinite(plain) else None
    except OverflowError:  # a whole number beyond every float
        return None


def whole(value: Any) -> int | None:
    """Return a whole number, or a float that is one (pandas makes them beside a missing value); else None."""
    as_number = number(value)
    return int(as_number) if as_number is not None and as_number == int(as_number) else None


def switch(value: Any) -> bool | None:
    """Return True or False, also for 1 and 0, which pandas, SQL and CSV make of them; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    return {0: False, 1: True}.get(whole(value))


def text(value: Any, origin: Origin, field: str) -> str:
    """Return a string that a tokenizer can read. Raises ExampleError for other types, and for half an emoji."""
    if not isinstance(value, str):
        raise ExampleError(origin, field, f"a {type(value).__name__} is not text", "Give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ExampleError(
            origin,
            field,
            f"half a character ({value[error.start]!a}) at position {error.start}: a surrogate without its pair",
            "Write the whole character (a cut emoji?), or U+FFFD in its place",
        ) from error
    return value


class _Short(reprlib.Repr):
    """repr that is never long, never deep and never fails."""

    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 100 else f"<whole number of {x.bit_length()} bits>"


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    return _Short().repr(value)
