"""Measure block sizes of the attention kernels on the accelerator at hand, and write the table that calls consult.

    make tune

For each call of the models (decoder rows, ViT windows and frames, perceiver) it times every candidate and keeps the
fastest: on TPU one for forward and backward together, on GPUs one for each kernel. Run it on one accelerator of the
kind that the table is for.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels import Unavailable, segment_attention
from jvlm_kernels.attention import tuning
from jvlm_kernels.attention.api import AttentionSpec
from timing import seconds

SEED = 0
IMPLEMENTATIONS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
CANDIDATES = {
    "tpu": [
        tuning.Blocks(q, kv, h) for q, kv, h in itertools.product((128, 256, 512), (128, 256, 512, 1024), (1, 2, 4))
    ],
    "cuda": [
        tuning.Blocks(q, kv, warps=warps) for q, kv, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8))
    ],
}
# name -> (length, query heads, key heads, head size, causal, lengths of segments, promise)
CALLS = {
    "decoder": (8192, 32, 8, 128, True, (200, 3000), None),
    "decoder, 32k": (32768, 32, 8, 128, True, (200, 6000), None),
    "ViT, windows": (16384, 16, 16, 80, False, (16, 64), 64),
    "ViT, frames": (16384, 16, 16, 80, False, (256, 4096), None),
    "perceiver": (4096, 16, 4, 96, False, (256, 1024), None),
}


def packed(length: int, segments: tuple[int, int]) -> np.ndarray:
    """Ids of one row, filled with segments of lengths drawn between the two given."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(segments[0], segments[1] + 1, length // segments[0] + 1)
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length].astype(np.int32)


def timed(kernel: str | None, settings: dict, operands, ids, rounds: int) -> float:
    """Median seconds of one kernel, or of forward and backward together."""

    def attend(q, k, v):
        return segment_attention(q, k, v, ids, ids, **settings)

    if kernel == "forward":
        return seconds(jax.jit(attend), operands, rounds)
    if kernel is None:
        return seconds(
            jax.jit(jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))), operands, rounds
        )
    out, pull = jax.vjp(attend, *operands)
    kept = slice(0, 1) if kernel == "d_queries" else slice(1, 3)  # what is not kept is not computed
    return seconds(jax.jit(lambda pull, d_out: pull(d_out)[kept]), (pull, jnp.ones_like(out)), rounds)


def fastest(name: str, kernel: str | None, candidates, settings: dict, operands, ids, rounds: int) -> tuning.Blocks:
    """The candidate that takes the least time. Raises RuntimeError if none runs."""
    found = []
    for blocks in candidates:
        try:
            taken = timed(kernel, {**settings, "blocks": blocks}, operands, ids, rounds)
        except (Unavailable, jax.errors.JaxRuntimeError) as error:
            print(f"{name:<24}{blocks}  does not run: {str(error).splitlines()[0][:80]}", flush=True)
            continue
        print(f"{name:<24}{blocks}  {1e3 * taken:8.2f} ms", flush=True)
        found.append((taken, blocks))
    if not found:
        raise RuntimeError(f"no candidate runs for {name}")
    return min(found, key=lambda pair: pair[0])[1]


def tune(platform: str, rounds: int) -> dict[str, dict[str, int]]:
    """Key of each call -> the fastest block sizes."""
    best: dict[str, dict[str, int]] = {}
    kernels = tuning.CUDA_KERNELS if platform == "cuda" else (None,)
    for name, (length, heads, kv_heads, head_size, causal, segments, promise) in CALLS.items():
        keys = jax.random.split(jax.random.key(SEED), 3)
        shapes = [(1, length, h, head_size) for h in (heads, kv_heads, kv_heads)]
        operands = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        ids = jnp.asarray(packed(length, segments))[None]
        settings = {"causal": causal, "max_segment_length": promise, "implementation": IMPLEMENTATIONS[platform]}
        candidates = [blocks for blocks in CANDIDATES[platform] if kv_heads % blocks.heads == 0]
        spec = AttentionSpec(causal, None, 1.0, promise)
        for kernel in kernels:
            label = name if kernel is None else f"{name}, {kernel}"
            blocks = fastest(label, kernel, candidates, settings, operands, ids, rounds)
            key = tuning.key_of(spec, length, heads // kv_heads, head_size, kernel)
            best[key] = dataclasses.asdict(blocks)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each candidate")
    arguments = parser.parse_args()
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in CANDIDATES:
        print(f"tuning needs a TPU or a GPU; JAX finds only {jax.default_backend()}", file=sys.stderr)
        return 1
    table = {"device": jax.devices()[0].device_kind, "blocks": tune(platform, arguments.rounds)}
    path = Path(tuning.__file__).with_name(f"tuned_{platform}.json")
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
