"""Block sizes for each kind of call, and nothing else. The tables are JSON beside this file; `make tune` writes them.

A key says what was measured: the queries of a key head in powers of two, head size in lanes, how far a query sees
("row" without a promise) and, on GPUs, which kernel. A call takes the entry that fits; one that has none gets the rule.
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
    """How a kernel cuts its work.

    Attributes:
      q, kv: queries and keys of a block.
      heads: key heads computed together, on TPU.
      warps: warps of 32 threads that compute a block, on GPUs.
    """

    q: int
    kv: int
    heads: int = 1
    warps: int = 4


@functools.cache
def table(platform: str) -> dict[str, Blocks]:
    """The measured entries for "tpu" or "cuda"; empty where none was measured."""
    path = _FOLDER / f"tuned_{platform}.json"
    if not path.is_file():
        return {}
    return {key: Blocks(**entry) for key, entry in json.loads(path.read_text())["blocks"].items()}


def key_of(spec, length: int, groups: int, head_size: int, kernel: str | None = None) -> str:
    """The table's key for a call, or for one kernel of it."""
    reach = min(r for r in (spec.window, spec.max_segment_length, length) if r is not None)
    seen = "row" if reach >= length else f"reach{_power_of_two(reach)}"
    call = f"length{_power_of_two(length)}-groups{groups}-head{-(-head_size // _LANES) * _LANES}-{seen}"
    return call if kernel is None else f"{call}-{kernel}"


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


CUDA_KERNELS = "forward", "d_queries", "d_keys"


def cuda_blocks(spec, q, k, kernel: str) -> Blocks:
    """Sizes for one of `CUDA_KERNELS`: as the call asks, from the table, or by rule."""
    (_, S, H, D), (_, T, K, _) = q.shape, k.shape
    found = spec.blocks or table("cuda").get(key_of(spec, max(S, T), H // K, D, kernel))
    found = found or _cuda_rule(kernel, D, q.dtype.itemsize)
    q_size, kv_size = (min(size, max(16, _power_of_two(length))) for size, length in ((found.q, S), (found.kv, T)))
    return dataclasses.replace(found, q=q_size, kv=kv_size, heads=1)


def _cuda_rule(kernel: str, head_size: int, itemsize: int) -> Blocks:
    """What the compiler for Hopper keeps in registers, with as few instructions for a score as it can be had.

    The larger a block of queries, the less often keys are read. The gradients keep one more product, or two, in
    registers than the forward pass, so their blocks are smaller; two of them share a multiprocessor, and one computes
    softmax while the other multiplies. docs/kernels.md has the compiler's figures.
    """
    if itemsize > 2:  # three matrix instructions for each, and their operands in parts
        short, long, warps = (32, 64, 8) if head_size <= 128 else (16, 32, 4)
        return Blocks(long, short, warps=warps) if kernel == "d_keys" else Blocks(short, long, warps=warps)
    if head_size > 128:
        sizes = {"forward": (64, 64), "d_queries": (64, 32), "d_keys": (32, 64)}
        return Blocks(*sizes[kernel], warps=8)
    if kernel == "forward":
        return Blocks(128, 64, warps=4 if head_size <= 64 else 8)
    return Blocks(64, 64, warps=4)


def _whole_lanes(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()
