"""Measure block sizes of the attention kernels on the accelerator at hand, and write the table that calls consult.

    make tune

It times every candidate on each kind of call of the models (decoder, windows and images of a ViT, perceiver) and
selects the fastest: on TPU one for forward and backward together, on GPUs one for each kernel. Run it on one
accelerator of the kind that the table is for.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels import Unavailable, segment_attention
from jvlm_kernels.attention import gpu, tuning
from jvlm_kernels.attention.api import AttentionSpec
from jvlm_kernels.attention.block_plan import logsumexp_and_delta

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, Python looks beside it only

from tools.timing import compile_all, seconds

SEED = 0
# errors of a candidate that is too large
REFUSED = (Unavailable, RuntimeError, ValueError, NotImplementedError)
IMPLEMENTATIONS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
CANDIDATES = {
    "tpu": [
        tuning.BlockSizes(q, kv, h) for q, kv, h in itertools.product((128, 256, 512), (128, 256, 512, 1024), (1, 2, 4))
    ],
    "cuda": [
        tuning.BlockSizes(q, kv, warps=warps)
        for q, kv, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8))
    ],
}
# name -> (length, query heads, key heads, head size, causal, segment lengths from and to, max_segment_length)
CALLS = {
    "decoder": (8192, 32, 8, 128, True, (200, 3000), None),
    "decoder, 32k": (32768, 32, 8, 128, True, (200, 6000), None),
    "ViT, windows": (16384, 16, 16, 80, False, (16, 64), 64),
    "ViT, images": (16384, 16, 16, 80, False, (256, 4096), None),
    "perceiver": (4096, 16, 4, 96, False, (256, 1024), None),
}


def packed(length: int, segments: tuple[int, int]) -> np.ndarray:
    """Return the segment ids of one sequence, filled with segments whose lengths are drawn between the two given."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(segments[0], segments[1] + 1, length // segments[0] + 1)
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length].astype(np.int32)


def kernel_call(kernel: str | None, spec: AttentionSpec, platform: str) -> Callable:
    """Return a function of (q, k, v, ids, out, logsumexp, d_out) that runs one kernel.

    ``kernel`` is one of `tuning.CUDA_KERNELS`; None is forward and backward together.
    """
    settings = {"causal": spec.causal, "max_segment_length": spec.max_segment_length, "block_sizes": spec.block_sizes}

    def both(q, k, v, ids, *_):
        def total(q, k, v):
            attended = segment_attention(q, k, v, ids, ids, implementation=IMPLEMENTATIONS[platform], **settings)
            return attended.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    def single(q, k, v, ids, out, logsumexp, d_out):
        offsets = jnp.zeros(q.shape[0], jnp.int32)
        if kernel == "forward":
            return gpu.forward(spec, q, k, v, ids, ids, offsets)
        lse, delta = logsumexp_and_delta(out, logsumexp, d_out, jnp.zeros_like(logsumexp), 1e20)
        backward = {"d_queries": gpu.d_queries, "d_keys": gpu.d_keys}[kernel]
        return backward(spec, q, k, v, d_out, lse, delta, ids, ids, offsets)

    return both if kernel is None else single


def fastest(name: str, candidates: list[tuning.BlockSizes], programs: list, operands, rounds: int) -> tuning.BlockSizes:
    """Return the candidate whose program takes the least time. Raises RuntimeError if none runs."""
    timed = []
    for sizes, program in zip(candidates, programs, strict=True):
        try:
            if isinstance(program, Exception):
                raise program
            elapsed = seconds(program, operands, rounds)
        except REFUSED as error:
            print(f"{name:<24}{sizes}  does not run: {str(error).splitlines()[0][:80]}", flush=True)
            continue
        print(f"{name:<24}{sizes}  {1e3 * elapsed:8.3f} ms", flush=True)
        timed.append((elapsed, sizes))
    if not timed:
        raise RuntimeError(f"no candidate runs for {name}")
    timed.sort(key=lambda pair: pair[0])
    print(f"{name:<24}{timed[0][1]}  fastest, {timed[-1][0] / timed[0][0]:.2f} x faster than the slowest", flush=True)
    return timed[0][1]


def tune(platform: str, rounds: int) -> dict[str, dict[str, int]]:
    """Return the fastest block sizes by the key of each call. All candidates of a call are compiled side by side."""
    best: dict[str, dict[str, int]] = {}
    kernels = tuning.CUDA_KERNELS if platform == "cuda" else (None,)
    for name, (length, heads, kv_heads, head_size, causal, segments, promise) in CALLS.items():
        keys = jax.random.split(jax.random.key(SEED), 4)
        shapes = [(1, length, h, head_size) for h in (heads, kv_heads, kv_heads, heads)]
        q, k, v, d_out = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True))
        ids = jnp.asarray(packed(length, segments))[None]
        settings = {"causal": causal, "max_segment_length": promise}
        out, logsumexp = jax.jit(
            lambda *qkv, ids=ids, settings=settings: segment_attention(
                *qkv, ids, ids, return_logsumexp=True, **settings
            )
        )(q, k, v)
        operands = (q, k, v, ids, out, logsumexp, d_out)
        candidates = [sizes for sizes in CANDIDATES[platform] if kv_heads % sizes.heads == 0]
        tried = [(kernel, sizes) for kernel in kernels for sizes in candidates]
        scale = head_size**-0.5
        programs = compile_all(
            [
                (
                    kernel_call(kernel, AttentionSpec(causal, None, scale, promise, block_sizes=sizes), platform),
                    operands,
                )
                for kernel, sizes in tried
            ],
            REFUSED,
        )
        for kernel in kernels:
            label = name if kernel is None else f"{name}, {kernel}"
            programs_of_kernel = [program for (k, _), program in zip(tried, programs, strict=True) if k == kernel]
            key = tuning.key_of(
                AttentionSpec(causal, None, scale, promise), length, heads // kv_heads, head_size, kernel
            )
            best[key] = dataclasses.asdict(fastest(label, candidates, programs_of_kernel, operands, rounds))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the table; None is beside the kernels")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each candidate")
    arguments = parser.parse_args()
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in CANDIDATES:
        print(f"tuning needs a TPU or a GPU; JAX finds only {jax.default_backend()}", file=sys.stderr)
        return 1
    table = {"device": jax.devices()[0].device_kind, "block_sizes": tune(platform, arguments.rounds)}
    path = arguments.output or Path(tuning.__file__).with_name(f"tuned_{platform}.json")
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
