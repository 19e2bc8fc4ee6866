"""Time and memory of the kernels on the device at hand, against what JAX offers, as ratios of one run.

    make bench-kernels

Attention: packed rows of segments of 512 tokens, forward and backward, over growing rows: cost should grow linearly.
Loss: a vocabulary of 32,768, forward and backward. Temporary memory is what the compiler reserves besides arguments
and results. A competitor whose memory would not fit is left out and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jvlm_kernels import linear_cross_entropy, segment_attention
from timing import seconds

HEADS, KV_HEADS, HEAD_SIZE, SEGMENT = 8, 2, 64, 512
TOKENS, HIDDEN, VOCABULARY = 4096, 512, 32768
MOST_MEMORY = 8 << 30
MIB = 1 << 20


def dense_mask(q, k, v, ids):
    """`jax.nn.dot_product_attention` with an S x S mask."""
    return jax.nn.dot_product_attention(q, k, v, mask=_mask(ids), implementation="xla")


def cudnn(q, k, v, ids):
    """The same by cuDNN, which takes the mask as a bias in memory."""
    return jax.nn.dot_product_attention(q, k, v, mask=_mask(ids), implementation="cudnn")


def _mask(ids):
    S = ids.shape[1]
    causal = jnp.arange(S)[:, None] >= jnp.arange(S)[None]
    return ((ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0) & causal)[:, None]


def ours(q, k, v, ids):
    """`segment_attention`, the implementation that the device gets."""
    return segment_attention(q, k, v, ids, ids, causal=True)


def mosaic_gpu(q, k, v, ids):
    """`segment_attention`, the implementation for Hopper that has to be named."""
    return segment_attention(q, k, v, ids, ids, causal=True, implementation="mosaic_gpu")


def plain_logits(hidden, kernel, targets):
    """Cross-entropy of all logits at once."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def in_blocks(hidden, kernel, targets):
    """`linear_cross_entropy`."""
    return linear_cross_entropy(hidden, kernel, targets).loss


def measured(function: Callable, operands, arguments: tuple[int, ...], rounds: int) -> tuple[float, int] | None:
    """(median seconds, temporary bytes) of value and gradients; None if it would not fit into memory."""

    def total(*operands):
        return function(*operands).astype(jnp.float32).sum()

    program = jax.jit(jax.value_and_grad(total, arguments)).lower(*operands).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    if temporary > MOST_MEMORY:
        return None
    return seconds(program, operands, rounds), temporary


def table(title: str, column: str) -> None:
    print(
        f"\n{title}\n\n| {column} | what | ms | temporary memory, MiB | times ours |\n"
        "| ---: | --- | ---: | ---: | ---: |"
    )


def compare(label: str, functions: list[Callable], operands, arguments, rounds: int) -> None:
    """Print a line for each; ours comes first, the others are told as multiples of its time."""
    first = None
    for function in functions:
        name = function.__doc__.strip().splitlines()[0].rstrip(".")
        found = measured(function, operands, arguments, rounds)
        if found is None:
            print(f"| {label} | {name} | more than {MOST_MEMORY // MIB:,} MiB of memory | | |", flush=True)
            continue
        first = first or found[0]
        sizes = f"{1e3 * found[0]:,.1f} | {found[1] / MIB:,.0f} | {found[0] / first:.2f}"
        print(f"| {label} | {name} | {sizes} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    arguments = parser.parse_args()
    platform = jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {jnp.dtype(dtype).name}")
    others = [dense_mask] + ([cudnn] if platform == "gpu" else [])
    if getattr(jax.devices()[0], "compute_capability", None) == "9.0":
        others.append(mosaic_gpu)
    shape = f"{HEADS}/{KV_HEADS} heads of {HEAD_SIZE}"
    table(f"Attention, causal, segments of {SEGMENT}, {shape}, forward and backward", "row")
    for S in arguments.lengths:
        sizes = [(1, S, h, HEAD_SIZE) for h in (HEADS, KV_HEADS, KV_HEADS)]
        qkv = [jax.random.normal(jax.random.key(i), size, dtype) for i, size in enumerate(sizes)]
        ids = (jnp.arange(S) // SEGMENT + 1)[None].astype(jnp.int32)
        compare(f"{S:,}", [ours, *others], (*qkv, ids), (0, 1, 2), arguments.rounds)
    table(f"Loss, {TOKENS:,} tokens of {HIDDEN} against a vocabulary of {VOCABULARY:,}, forward and backward", "tokens")
    hidden = jax.random.normal(jax.random.key(0), (TOKENS, HIDDEN), dtype)
    kernel = jax.random.normal(jax.random.key(1), (HIDDEN, VOCABULARY), dtype) * HIDDEN**-0.5
    targets = jax.random.randint(jax.random.key(2), (TOKENS,), 0, VOCABULARY)
    compare(f"{TOKENS:,}", [in_blocks, plain_logits], (hidden, kernel, targets), (0, 1), arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
