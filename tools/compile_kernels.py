"""Compile the kernels for TPU topologies with the real compiler, on any machine, beside JAX's splash attention.

    python tools/compile_kernels.py v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1

Needs libtpu (`pip install libtpu`, or PYTHONPATH=.venv/tpu-compiler after `make test`) and no TPU. For each call at the
shapes of real models, forward and backward together, it prints a Markdown row: vector memory reserved for a kernel,
temporary memory of the whole program, seconds to compile. A kernel that does not compile ends it with its error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable

from planning.environment import WITHOUT_A_TPU

os.environ.update(WITHOUT_A_TPU)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jvlm_kernels import decode_attention, segment_attention

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call: queries and keys of a row, query and key heads, head size."""

    name: str
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_size: int
    causal: bool = False
    max_segment_length: int | None = None


SHAPES = (
    Shape("MiMo-VL decoder, 8k", 8192, 8192, 32, 8, 128, causal=True),
    Shape("MiMo-VL decoder, 32k", 32768, 32768, 32, 8, 128, causal=True),
    Shape("Qwen ViT, full", 16384, 16384, 16, 16, 80),
    Shape("Qwen ViT, windows", 16384, 16384, 16, 16, 80, max_segment_length=64),
    Shape("Idefics2 perceiver", 1024, 17408, 16, 4, 96),
    Shape("SigLIP", 4900, 4900, 16, 16, 72),
)


def ours(shape: Shape) -> Callable:
    """Forward and all gradients of `segment_attention`."""

    def total(q, k, v, q_ids, kv_ids):
        settings = {"causal": shape.causal, "max_segment_length": shape.max_segment_length}
        return segment_attention(q, k, v, q_ids, kv_ids, **settings).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


def splash_attention(shape: Shape) -> Callable | None:
    """The same with JAX's own kernel; None where it has no such call (lengths that are no multiple of 128)."""
    if shape.queries % 128 or shape.keys % 128:
        return None
    size = (shape.queries, shape.keys)
    mask = masks.CausalMask(size) if shape.causal else masks.FullMask(size)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes = splash.BlockSizes(**{f"block_{name}": 512 for name in names})
    groups = shape.heads // shape.kv_heads

    def total(q, k, v, q_ids, kv_ids):
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * shape.heads), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        heads_first = [jnp.moveaxis(x[0], 1, 0) for x in (q * shape.head_size**-0.5, k, v)]
        k, v = (jnp.repeat(x, groups, axis=0) for x in heads_first[1:])
        out = kernel(heads_first[0], k, v, segment_ids=splash.SegmentIds(q_ids[0], kv_ids[0]))
        return out.astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


def compiled(function: Callable, operands, device) -> dict[str, float]:
    """Compile for one device: {"vmem": bytes, "temporary": bytes, "kernels": number, "seconds": of compilation}."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    text = program.as_text()
    scoped = re.findall(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', text)
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "vmem": max(map(int, scoped), default=0),
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "seconds": time.perf_counter() - began,
    }


def attention_operands(shape: Shape) -> list[tuple]:
    rows = [(shape.queries, shape.heads), (shape.keys, shape.kv_heads), (shape.keys, shape.kv_heads)]
    floats = [((1, length, heads, shape.head_size), jnp.bfloat16) for length, heads in rows]
    return floats + [((1, length), jnp.int32) for length in (shape.queries, shape.keys)]


def decode_operands(paged: bool) -> list[tuple]:
    """MiMo-VL decoding 16 sequences of up to 32k places, in a row each or in pages of 128."""
    rows, places = (4096, 128) if paged else (16, 32768)
    cache = [((rows, 8, 128, places), jnp.bfloat16), ((rows, 8, places, 128), jnp.bfloat16)]
    tables = [((16, 256), jnp.int32)] if paged else []
    return [((16, 1, 32, 128), jnp.bfloat16), *cache, ((16,), jnp.int32), *tables]


def decode(q, keys, values, lengths, tables=None):
    """One new token of each sequence."""
    return decode_attention(q, (keys, values), lengths, block_tables=tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="+", help="such as v5e:2x2; one device of it is compiled for")
    parser.add_argument("--ours", action="store_true", help="leave splash attention out")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    arguments = parser.parse_args()
    if not arguments.json:
        print("| device | call | kernel | custom calls | vector memory, MiB | temporary memory, MiB | compiled in, s |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for topology in arguments.topologies:
        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        calls = [(s.name, "segment_attention", ours(s), attention_operands(s)) for s in SHAPES]
        if not arguments.ours:
            calls += [(s.name, "splash", splash_attention(s), attention_operands(s)) for s in SHAPES]
        names = {False: "decoding, rows", True: "decoding, pages"}
        calls += [(names[p], "decode_attention", decode, decode_operands(p)) for p in (False, True)]
        for name, kernel, function, operands in calls:
            if function is None:
                continue
            found = compiled(function, operands, device)
            line = {"device": device.device_kind, "call": name, "kernel": kernel, **found}
            if arguments.json:
                print(json.dumps(line), flush=True)
            else:
                sizes = f"{found['vmem'] / MIB:.1f} | {found['temporary'] / MIB:,.0f} | {found['seconds']:.1f}"
                print(f"| {device.device_kind} | {name} | {kernel} | {found['kernels']} | {sizes} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
