"""Compile the kernels for TPUs and GPUs with the real compilers, on any machine, beside JAX's own attention kernels.

    PYTHONPATH=.venv/tpu-compiler python tools/compile_kernels.py v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1
    PYTHONPATH=.venv/gpu-compiler python tools/compile_kernels.py a100 h100 h200 b200
    PYTHONPATH=.venv/gpu-compiler python tools/compile_kernels.py h100 h200 --implementation mosaic_gpu

Needs no TPU and no GPU, but the compilers, which `make test` puts into those folders. For each call at the shapes of
real models, forward and backward together, it prints a Markdown row: what the kernels need of a core (vector memory;
or registers of a thread, bytes spilled from them, shared memory of a block), temporary memory of the whole program,
seconds to compile. A kernel of ours that does not compile ends it with its error.
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

from jvlm.planning.environment import WITHOUT_A_GPU, WITHOUT_A_TPU

os.environ.update(WITHOUT_A_TPU | WITHOUT_A_GPU)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.gpu import attention as triton_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jvlm_kernels import decode_attention, segment_attention
from jvlm_kernels.platforms import compiling_for

from jvlm.planning import gpus, machine_code

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


def ours(shape: Shape, implementation: str | None = None) -> Callable:
    """Forward and all gradients of `segment_attention`."""

    def total(q, k, v, q_ids, kv_ids):
        settings = {"causal": shape.causal, "max_segment_length": shape.max_segment_length}
        return (
            segment_attention(q, k, v, q_ids, kv_ids, **settings, implementation=implementation)
            .astype(jnp.float32)
            .sum()
        )

    return jax.grad(total, (0, 1, 2))


def splash_attention(shape: Shape) -> Callable | None:
    """Return the same with JAX's own kernel; None where it has no such call (lengths that are no multiple of 128)."""
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


def jax_triton(shape: Shape) -> Callable | None:
    """Return the same with JAX's own Pallas attention for GPUs; None where its blocks of 128 do not fit the lengths."""
    if shape.queries != shape.keys or shape.queries % 128:
        return None
    groups = shape.heads // shape.kv_heads

    def total(q, k, v, ids, _):
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        scale = shape.head_size**-0.5
        return triton_attention.mha(q, k, v, ids, sm_scale=scale, causal=shape.causal).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


class Tpu:
    """libtpu's compiler for one chip of a topology, such as v5e:2x2."""

    columns = ("vector memory, MiB",)
    other = "splash", splash_attention
    platform = "tpu"

    def __init__(self, topology: str) -> None:
        self.device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def compile(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, dict[str, float]]:
        program = lowered.compile()
        text = program.as_text()
        scoped = re.findall(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', text)
        kernels = text.count('custom_call_target="tpu_custom_call"')
        return program, {"kernels": kernels, "vmem": max(map(int, scoped), default=0)}

    def row(self, found: dict) -> list[str]:
        return [f"{found['vmem'] / MIB:.1f}"]


class Gpu:
    """XLA's compiler and NVIDIA's assembler for a GPU, such as h200; kernels in the order of their names."""

    columns = ("registers", "spilled, bytes", "shared memory, KiB", "matrix instructions")
    other = "jax.experimental.pallas.ops.gpu", jax_triton
    platform = "cuda"
    kernels = r"segment_attention_\w+|decode_attention\w*|mha_\w+"

    def __init__(self, name: str) -> None:
        self.device = gpus.devices(name)[0]

    def compile(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, dict[str, object]]:
        program, kernels = machine_code.compile_with_kernels(lowered, self.kernels)
        return program, {"kernels": len(kernels), "code": [dataclasses.asdict(kernel) for kernel in kernels]}

    def row(self, found: dict) -> list[str]:
        code = found["code"]
        kinds = sorted({kind for kernel in code for kind in kernel["products"]})
        shared = ", ".join(f"{kernel['shared'] / 1024:.0f}" for kernel in code)
        each = [", ".join(str(kernel[what]) for kernel in code) for what in ("registers", "spilled")]
        return [*each, shared, ", ".join(kinds)]


def compiled(function: Callable, operands, compiler: Tpu | Gpu) -> dict[str, object]:
    """Compile for one device: what the kernels need, "temporary" bytes, "seconds" of compilation."""
    sharding = jax.sharding.SingleDeviceSharding(compiler.device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
    began = time.perf_counter()
    program, found = compiler.compile(jax.jit(function).lower(*arguments))
    temporary = program.memory_analysis().temp_size_in_bytes
    return {**found, "temporary": temporary, "seconds": time.perf_counter() - began}


def attention_operands(shape: Shape) -> list[tuple]:
    rows = [(shape.queries, shape.heads), (shape.keys, shape.kv_heads), (shape.keys, shape.kv_heads)]
    floats = [((1, length, heads, shape.head_size), jnp.bfloat16) for length, heads in rows]
    return floats + [((1, length), jnp.int32) for length in (shape.queries, shape.keys)]


def decode_operands(paged: bool) -> list[tuple]:
    """MiMo-VL decoding 16 sequences of up to 32k tokens, in a cache row each or in pages of 128."""
    rows, cache_len = (4096, 128) if paged else (16, 32768)
    cache = [((rows, 8, 128, cache_len), jnp.bfloat16), ((rows, 8, cache_len, 128), jnp.bfloat16)]
    tables = [((16, 256), jnp.int32)] if paged else []
    return [((16, 1, 32, 128), jnp.bfloat16), *cache, ((16,), jnp.int32), *tables]


def decode(q, keys, values, lengths, tables=None):
    """One new token of each sequence."""
    return decode_attention(q, (keys, values), lengths, block_tables=tables)


def calls(
    compiler: Tpu | Gpu, ours_alone: bool, implementation: str | None
) -> list[tuple[str, str, Callable | None, list[tuple]]]:
    """(call, kernel, function, operands) of all that is compiled for a device."""
    if implementation is not None:
        return [(s.name, implementation, ours(s, implementation), attention_operands(s)) for s in SHAPES]
    found = [(s.name, "segment_attention", ours(s), attention_operands(s)) for s in SHAPES]
    if not ours_alone:
        name, other = compiler.other
        found += [(s.name, name, other(s), attention_operands(s)) for s in SHAPES]
    paged = {"decoding, rows": False, "decoding, pages": True}
    return found + [(name, "decode_attention", decode, decode_operands(paged[name])) for name in paged]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "devices", nargs="+", help="TPU topologies such as v5e:2x2, or GPUs; one device is compiled for"
    )
    parser.add_argument("--calls", default="", metavar="PATTERN", help="only calls whose names match, such as 'ViT|8k'")
    parser.add_argument("--ours", action="store_true", help="leave JAX's own kernels out")
    parser.add_argument("--implementation", help="attention alone, by the implementation of this name")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    arguments = parser.parse_args()
    heading: tuple[str, ...] = ()
    for name in arguments.devices:
        compiler = Gpu(name) if name in gpus.GPUS else Tpu(name)
        for call, kernel, function, operands in calls(compiler, arguments.ours, arguments.implementation):
            if function is None or not re.search(arguments.calls, call):
                continue
            # JAX 0.11 asks the default device for its generation when it lowers Triton kernels
            device = jax.default_device(compiler.device if compiler.platform == "cuda" else None)
            with device, compiling_for(compiler.platform):
                found = compiled(function, operands, compiler)
            kind = compiler.device.device_kind
            if arguments.json:
                print(json.dumps({"device": kind, "call": call, "kernel": kernel, **found}), flush=True)
                continue
            if heading != compiler.columns:
                heading = compiler.columns
                names = ("device", "call", "kernel", "kernels", *heading, "temporary memory, MiB", "compiled in, s")
                print(f"| {' | '.join(names)} |\n|{' --- |' * 3}{' ---: |' * (len(names) - 3)}")
            sizes = [*compiler.row(found), f"{found['temporary'] / MIB:,.0f}", f"{found['seconds']:.1f}"]
            print(f"| {' | '.join([kind, call, kernel, str(found['kernels']), *sizes])} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
