"""The type checker that `tests/conftest.py` applies to jvlm: shapes and dtypes of arrays, and nothing else.

Annotations without an array are ignored, so that tests may pass stand-ins for other objects.
"""

import typing
from pathlib import Path

import beartype
import jax
import jaxtyping
import numpy as np


class _NotAnArrayType(type):
    def __instancecheck__(cls, instance) -> bool:
        return not isinstance(instance, jax.Array | np.ndarray)


class NotAnArray(metaclass=_NotAnArrayType):
    """Anything but an array."""


def check_arrays(function):
    """Return the function with its array annotations checked at every call.

    A field of a dataclass may also hold something that is no array: JAX and Flax fill the dataclasses that are pytrees
    with shapes, shardings and placeholders.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if mentions_array(hint)}
    if function.__qualname__.endswith(".__init__"):
        hints = {name: hint | NotAnArray for name, hint in hints.items()}
    function.__annotations__ = hints
    return beartype.beartype(function) if hints else function


def annotated_modules() -> list[str]:
    """Return the modules of jvlm that import jaxtyping; no other can have an annotation with a shape."""
    root = Path(__file__).resolve().parents[1]
    files = (path for path in sorted(root.glob("jvlm/**/*.py")) if "jaxtyping" in path.read_text())
    return [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in files]


def mentions_array(hint) -> bool:
    """Return whether an annotation is, or contains, an array of jaxtyping."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(mentions_array(part) for part in typing.get_args(hint))
