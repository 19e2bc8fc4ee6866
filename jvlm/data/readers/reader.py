"""What every reader of a data file offers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Protocol, runtime_checkable

from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError


class Reader(Protocol):
    """Random access to the records of one file. Picklable; the file is opened by each process when it first reads.

    Attributes:
      path: of the file.
    """

    path: str

    def __len__(self) -> int: ...

    def number(self, index: int) -> int:
        """Return the number of a record as errors name it, from 1: its line in text files."""

    def read(self, index: int, origin: Origin) -> Any:
        """Return a record, or the ExampleError of one that cannot be read."""


@runtime_checkable
class MediaReader(Reader, Protocol):
    """A reader of files that hold the media of their records."""

    def resolve(self, record: Any, index: int, origin: Origin) -> Any:
        """Return a converted record whose media are the file's own. Raises ExampleError for any other."""


def parse_json(content: bytes, origin: Origin, fix: str, note: str = "") -> Any:
    """Return the value of a JSON text in UTF-8, or the ExampleError of one that is none or has a key twice.

    Args:
      fix: how to correct a text that is not JSON.
      note: what more there is to say about it.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: unique_object(origin, pairs))
    except ExampleError as error:
        return error
    except RecursionError:
        return ExampleError(origin, "example", "lists or objects nested too deep", "Make the example flatter")
    except UnicodeDecodeError as error:
        return ExampleError(origin, "example", f"not UTF-8 ({error}){note}", "Write the file in UTF-8")
    except ValueError as error:
        return ExampleError(origin, "example", f"not JSON ({error}){note}", fix)


def unique_object(origin: Origin, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ExampleError for a key that it has twice: nothing says which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ExampleError(origin, twice, "the same key twice in one object", "Keep one of them")
    return found


def missing_package(path: str, kind: str, package: str, extra: str) -> UserError:
    """Return the error of a kind of file whose package is not installed."""
    return UserError(f"{path}: {kind} is read with {package}: pip install 'jvlm[{extra}]'")
