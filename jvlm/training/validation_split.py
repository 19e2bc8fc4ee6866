"""A split of the training data into training and validation examples, by image.

Examples that share an image, by its bytes or its path, directly or through others, stay on one side; examples without
images go by their content. The split is made once, from what the examples hold and the run's seed alone, and written
to ``<run>/validation_split.json``: a restart has the same. Where the data has changed since
(`Experiment.accept_changes`), images that were held out stay so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jvlm.data.config import DataConfig
from jvlm.data.content import media_sources
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.images import image_source, unwrap
from jvlm.data.mixture.examples import Examples
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.training.side_files import read_json, write_json

SPLIT = "validation_split.json"
_BLOCK = 1024  # examples whose images are read at a time


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices into the examples of the data, ascending.

    Attributes:
      held_out: hashes of what validation examples hold, so that other data can leave it out.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    held_out: frozenset[str]


def split_data(data: DataConfig, share: float, seed: int, folder: Path) -> Split:
    """Return the split of a run, as it was recorded or made now; every process must call it.

    Args:
      share: of the examples to hold out; from 1 on it is their number.
      folder: of the run.

    Raises:
      UserError: the run was begun with another share or seed; nothing, or everything, would be held out.
    """
    made = hosts.broadcast_from_0(hosts.run_on_all(lambda: _load_or_make(data, share, seed, folder)))
    return Split(tuple(made["train"]), tuple(made["validation"]), frozenset(made["held_out"]))


def without_held_out(data: DataConfig, held_out: frozenset[str]) -> Examples:
    """Return the examples of other training data that share nothing with what is held out."""
    source = Examples.open(data)
    keys = example_keys(source, data)
    return source.subset([index for index, own in enumerate(keys) if not held_out.intersection(own)])


def _load_or_make(data: DataConfig, share: float, seed: int, folder: Path) -> dict[str, Any] | None:
    if not hosts.is_rank0():
        return None
    path = folder / SPLIT
    source = Examples.open(data)
    saved = read_json(path, "the run cannot go on without it: restore it, or choose another --name")
    if saved is None:
        print(f"splitting {len(source)} examples by image", flush=True)
        distinct = source.distinct()
        keys = example_keys(source, data)
        _, validation, held_out = make_split([keys[index] for index in distinct], share, seed)
        validation = [distinct[index] for index in validation]
        train = [index for index, own in enumerate(keys) if not held_out.intersection(own)]
    else:
        now = {"split": share, "seed": seed}
        for name, value in now.items():
            if saved[name] != value:
                raise UserError(
                    f"{path}: this run was begun with {name} {saved[name]}, now {value}: what was held out would be "
                    "trained on. Put it back, or choose another --name"
                )
        if saved["counts"] == source.counts():
            return saved
        keys, held_out = example_keys(source, data), frozenset(saved["held_out"])
        # an example that brings a held-out image together with others is on neither side
        validation = [index for index in source.distinct() if held_out.issuperset(keys[index])]
        train = [index for index, own in enumerate(keys) if not held_out.intersection(own)]
    values = {"split": share, "seed": seed, "counts": source.counts(), "held_out": sorted(held_out)}
    values |= {"validation": list(map(int, validation)), "train": list(map(int, train))}
    write_json(path, values)
    return values


def make_split(keys: Sequence[frozenset[str]], share: float, seed: int) -> tuple[list[int], list[int], frozenset[str]]:
    """Return (training indices, validation indices, keys of the validation examples).

    Whole groups of examples are drawn, in an order that depends on their keys and the seed, while they fit the share.

    Args:
      keys: of each example; those that have one in common stay together.

    Raises:
      UserError: no group fits, or nothing is left to train on.
    """
    wanted = round(share * len(keys)) if share < 1 else int(share)
    groups = _groups(keys)
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    chosen: list[int] = []
    for name in order:
        if len(chosen) + len(groups[name]) <= wanted:
            chosen += groups[name]
    if not chosen or len(chosen) == len(keys):
        largest = max(map(len, groups.values()), default=0)
        raise UserError(
            f"validation.split {share:g} of {len(keys)} examples cannot be held out: they are {len(groups)} groups "
            f"that share no image, the largest of {largest}. Change validation.split, or give validation.data"
        )
    held_out = frozenset().union(*(keys[index] for index in chosen))
    inside = set(chosen)
    return [i for i in range(len(keys)) if i not in inside], sorted(chosen), held_out


def _groups(keys: Sequence[frozenset[str]]) -> dict[str, list[int]]:
    """Return the connected groups of examples, by their smallest key."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for own in keys:
        for key in own:
            parent.setdefault(key, key)
        first, *others = sorted(own)
        for key in others:
            a, b = sorted((root(first), root(key)))
            parent[b] = a
    groups: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(keys):
        groups[root(min(own))].append(index)
    return groups


def example_keys(source: Examples, data: DataConfig) -> list[frozenset[str]]:
    """Return a hash of each image of each example; of its content where it has none."""
    keys: list[frozenset[str]] = []
    with ThreadPoolExecutor(data.read_threads) as pool:
        for start in range(0, len(source), _BLOCK):
            indices = range(start, min(start + _BLOCK, len(source)))
            keys += pool.map(lambda index: _keys_of(*source[index], data), indices)
    return keys


def _keys_of(origin: Origin, example: Any, data: DataConfig) -> frozenset[str]:
    roots = (str(Path(origin.file).parent), *([data.media_root] if data.media_root else []))
    try:
        if isinstance(example, ExampleError):
            raise example
        conversation = parse_example(example, origin)
    except ExampleError:  # trained on never, whatever side it is on
        return frozenset([_hash(f"{origin.file} {origin.number}".encode())])
    images = (image for part in conversation.media for image in media_sources(part))
    keys = frozenset().union(*(_image_keys(image, origin, roots) for image in images))
    return keys or frozenset([_hash(json.dumps(example, sort_keys=True, default=str).encode())])


def _image_keys(source: Any, origin: Origin, roots: tuple[str, ...]) -> set[str]:
    """Hashes of an image's bytes and of its path; of the path as written where there is no such file."""
    source, keys = unwrap(source), set()
    if isinstance(source, str | Path):
        try:
            content = image_source(str(source), roots, origin, "images")
        except ExampleError:
            return {_hash(str(source).encode())}
        if isinstance(content, Path):
            keys.add(_hash(str(content.resolve()).encode()))
            content = content.read_bytes()
        source = content
    return keys | {
        _hash(bytes(source) if isinstance(source, bytes | bytearray | memoryview) else repr(source).encode())
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
