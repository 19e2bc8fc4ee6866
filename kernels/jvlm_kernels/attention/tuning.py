"""Block sizes for each kind of call, and nothing else. The tables are JSON beside this file; `make tune` writes them.

A key says what was measured: the queries of a key head in powers of two, head size in lanes, and how far a query
sees ("row" without a promise). A call takes the entry that fits; one that has none gets the rule below.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

_FOLDER = Path(__file__).parent
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, and key heads computed together."""

    q: int
    kv: int
    heads: int = 1


@functools.cache
def table(platform: str) -> dict[str, Blocks]:
    """The measured entries for "tpu" or "cuda"; empty where none was measured."""
    path = _FOLDER / f"tuned_{platform}.json"
    if not path.is_file():
        return {}
    return {key: Blocks(**entry) for key, entry in json.loads(path.read_text())["blocks"].items()}


def key_of(spec, length: int, groups: int, head_size: int) -> str:
    """The table's key for a call."""
    reach = min(r for r in (spec.window, spec.max_segment_length, length) if r is not None)
    seen = "row" if reach >= length else f"reach{_power_of_two(reach)}"
    return f"length{_power_of_two(length)}-groups{groups}-head{-(-head_size // _LANES) * _LANES}-{seen}"


def tpu_blocks(spec, q, k) -> Blocks:
    """Sizes for a TPU call: as the call asks, from the table, or by rule.

    The rule: about 1,024 query rows in a matrix (all the heads of a group together) against 512 keys fill the matrix
    unit and fit vector memory; where segments are short, blocks of 128 skip more, and several heads share a grid step
    to pay for its overhead. All of this fits 16 MiB of vector memory.
    """
    (_, S, H, D), (_, T, K, _) = q.shape, k.shape
    groups = H // K
    found = spec.blocks or table("tpu").get(key_of(spec, max(S, T), groups, D))
    if found is None:
        reach = min(r for r in (spec.window, spec.max_segment_length, max(S, T)) if r is not None)
        short = reach <= 256
        queries = 128 if short else max(128, _LANES * (1024 // groups // _LANES))
        found = Blocks(min(queries, 512), 128 if short else 512, 4 if short and groups == 1 else 1)
    heads = max(h for h in range(1, found.heads + 1) if K % h == 0)
    return Blocks(min(found.q, _whole_lanes(S)), min(found.kv, _whole_lanes(T)), heads)


def cuda_blocks(spec, q, k) -> Blocks:
    """Sizes for a GPU call: as the call asks, from the table, or by rule: shared memory bounds block x head size."""
    (_, S, H, D), (_, T, K, _) = q.shape, k.shape
    found = spec.blocks or table("cuda").get(key_of(spec, max(S, T), H // K, D))
    if found is None:
        found = Blocks(64, 64) if D > 128 or q.dtype.itemsize > 2 else Blocks(128, 64)
    return Blocks(min(found.q, max(16, _power_of_two(S))), min(found.kv, max(16, _power_of_two(T))), 1)


def _whole_lanes(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()
