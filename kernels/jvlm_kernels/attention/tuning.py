"""Block sizes of the attention kernels: measured ones from a table, or a rule.

The tables are JSON files beside this one, which `make tune` writes. Their keys name the length in powers of two, query
heads of a key head, head size in lanes, how far a query attends ("all" without a limit) and, on GPUs, the kernel. A
call whose key is missing gets the rule.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from jvlm_kernels.constants import LANES

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of one kernel.

    Attributes:
      q: queries of a block.
      kv: keys of a block.
      heads: key heads that one grid step computes, on TPU.
      warps: warps of 32 threads that compute a block, on GPUs.
    """

    q: int
    kv: int
    heads: int = 1
    warps: int = 4


@functools.cache
def table(platform: str) -> dict[str, BlockSizes]:
    """Return the measured entries for "tpu" or "cuda"; empty where none was measured."""
    path = _FOLDER / f"tuned_{platform}.json"
    if not path.is_file():
        return {}
    return {key: BlockSizes(**entry) for key, entry in json.loads(path.read_text())["block_sizes"].items()}


def key_of(spec, length: int, groups: int, head_size: int, kernel: str | None = None) -> str:
    """Return the table's key for a call, or for one kernel of it."""
    reach = min(r for r in (spec.window, spec.max_segment_length, length) if r is not None)
    limit = "all" if reach >= length else f"reach{_power_of_two(reach)}"
    call = f"length{_power_of_two(length)}-groups{groups}-head{_whole_lanes(head_size)}-{limit}"
    return call if kernel is None else f"{call}-{kernel}"


def tpu_blocks(spec, q, k) -> BlockSizes:
    """Return the sizes for a TPU call: as the call asks, from the table, or by rule.

    The rule: a matrix of about 1,024 queries (all heads of a group together) against 512 keys fills the matrix unit.
    Where segments are short, blocks of 128 skip more, and several heads share a grid step to amortise its overhead.
    All of these fit into 16 MiB of vector memory.
    """
    (_, S, H, D), (_, T, K, _) = q.shape, k.shape
    groups = H // K
    sizes = spec.block_sizes or table("tpu").get(key_of(spec, max(S, T), groups, D))
    if sizes is None:
        reach = min(r for r in (spec.window, spec.max_segment_length, max(S, T)) if r is not None)
        short = reach <= 256
        queries = 128 if short else max(128, LANES * (1024 // groups // LANES))
        sizes = BlockSizes(min(queries, 512), 128 if short else 512, 4 if short and groups == 1 else 1)
    heads = max(h for h in range(1, sizes.heads + 1) if K % h == 0)
    return BlockSizes(min(sizes.q, _whole_lanes(S)), min(sizes.kv, _whole_lanes(T)), heads)


CUDA_KERNELS = "forward", "d_queries", "d_keys"


def cuda_blocks(spec, q, k, kernel: str) -> BlockSizes:
    """Return the sizes for one of `CUDA_KERNELS`: as the call asks, from the table, or by rule."""
    (_, S, H, D), (_, T, K, _) = q.shape, k.shape
    sizes = spec.block_sizes or table("cuda").get(key_of(spec, max(S, T), H // K, D, kernel))
    sizes = sizes or _cuda_rule(kernel, D, q.dtype.itemsize)
    q_size, kv_size = (min(size, max(16, _power_of_two(length))) for size, length in ((sizes.q, S), (sizes.kv, T)))
    return dataclasses.replace(sizes, q=q_size, kv=kv_size, heads=1)


def _cuda_rule(kernel: str, head_size: int, itemsize: int) -> BlockSizes:
    """Return the largest blocks whose accumulators the compiler for Hopper keeps in registers.

    The larger a block of queries, the less often keys are read. The gradient kernels hold one or two more products in
    registers than the forward kernel, so their blocks are smaller; two of them share a multiprocessor, and one computes
    softmax while the other multiplies. docs/kernels.md has the compiler's figures.
    """
    if itemsize > 2:  # three matrix instructions for each product, and their operands in two halves
        short, long, warps = (32, 64, 8) if head_size <= 128 else (16, 32, 4)
        return BlockSizes(long, short, warps=warps) if kernel == "d_keys" else BlockSizes(short, long, warps=warps)
    if head_size > 128:
        sizes = {"forward": (64, 64), "d_queries": (64, 32), "d_keys": (32, 64)}
        return BlockSizes(*sizes[kernel], warps=8)
    if kernel == "forward":
        return BlockSizes(128, 64, warps=4 if head_size <= 64 else 8)
    return BlockSizes(64, 64, warps=4)


def _whole_lanes(length: int) -> int:
    return -(-length // LANES) * LANES


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()
