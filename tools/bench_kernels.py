"""Time and memory of the kernels on the device at hand, against what JAX and torch offer, as ratios of one run.

    make bench-kernels

Attention: causal conversations, one that fills the packed sequence or many of 512 tokens, over growing lengths; the
cost of packed ones should grow linearly. On a GPU also the vision tower: images and windows of patches. Forward alone,
and forward and backward. Operations a second count visible pairs alone: 4 x pairs x heads x head size forward, 2.5
times that backward. Loss: value and both gradients, with all tokens supervised and with every fourth (a sequence of
images and questions), and only those count as operations.

Temporary memory is what is reserved besides arguments and results. torch takes part where it is installed (its
variable-length attention on GPUs alone). What cannot run is listed with the reason. A round is several calls that the
device runs back to back.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention as pallas_triton
from jvlm_kernels import (
    Unavailable,
    decode_attention,
    linear_cross_entropy,
    linear_cross_entropy_sum,
    segment_attention,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, Python looks beside it only

from tools.timing import compile_all, seconds

SEGMENT = 512
PASSES = {False: "forward", True: "forward and backward"}
MOST_MEMORY = 8 << 30
MIB = 1 << 20
ON_GPU = jax.default_backend() == "gpu"
CALLS = 5 if ON_GPU else 1  # of a round; a CPU runs them one after the other anyway
REFUSED = (Unavailable, ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of one packed sequence: heads are query heads, key heads and head size.

    Attributes:
      segment: tokens of each segment; None is one segment that fills the sequence.
    """

    S: int
    heads: tuple[int, int, int]
    dtype: str
    segment: int | None
    backward: bool
    causal: bool = True

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        segment = self.segment or self.S
        return [min(segment, self.S - first) for first in range(0, self.S, segment)]

    @property
    def operations(self) -> float:
        pairs = sum(n * (n + 1) / 2 if self.causal else n * n for n in self.lengths)
        return 4 * pairs * self.heads[0] * self.heads[2] * (3.5 if self.backward else 1)

    def operands(self) -> tuple[list[jax.Array], jax.Array]:
        """(q, k, v) [1, S, heads, head size] and segment ids [1, S]."""
        H, K, D = self.heads
        qkv = [jax.random.normal(jax.random.key(i), (1, self.S, h, D), self.dtype) for i, h in enumerate((H, K, K))]
        ids = np.repeat(np.arange(1, len(self.lengths) + 1, dtype=np.int32), self.lengths)
        return qkv, jnp.asarray(ids)[None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a call, and temporary bytes where they are known."""

    seconds: float
    temporary: int | None


def ours(case: Case) -> Callable:
    """`segment_attention`, the implementation that the device gets."""
    return _segment_attention(case, None)


def ours_triton(case: Case) -> Callable:
    """`segment_attention`, implementation pallas_gpu (Triton)."""
    return _segment_attention(case, "pallas_gpu")


def ours_mosaic(case: Case) -> Callable:
    """`segment_attention`, implementation mosaic_gpu."""
    return _segment_attention(case, "mosaic_gpu")


def _segment_attention(case: Case, implementation: str | None) -> Callable:
    # a bound on segments is a promise that models make of their windows alone
    promise = case.segment if case.segment and not case.causal and case.segment <= 64 else None

    def attend(q, k, v, ids):
        return segment_attention(
            q, k, v, ids, ids, causal=case.causal, max_segment_length=promise, implementation=implementation
        )

    return attend


def xla(case: Case) -> Callable:
    """`jax.nn.dot_product_attention`, XLA."""
    return _dot_product_attention(case, "xla")


def cudnn(case: Case) -> Callable:
    """`jax.nn.dot_product_attention`, cuDNN (a mask as a bias in memory where sequences are packed)."""
    return _dot_product_attention(case, "cudnn")


def _dot_product_attention(case: Case, implementation: str) -> Callable:
    def attend(q, k, v, ids):
        mask = (ids[:, :, None] == ids[:, None])[:, None] if case.segment else None
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=case.causal, implementation=implementation)

    return attend


def jax_triton(case: Case) -> Callable:
    """JAX's Pallas Triton attention, keys repeated."""
    H, K, D = case.heads

    def attend(q, k, v, ids):
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        return pallas_triton.mha(q, k, v, ids if case.segment else None, sm_scale=D**-0.5, causal=case.causal)

    return attend


def attention_pass(make: Callable, case: Case) -> tuple[Callable, tuple]:
    """Return (function, operands) of a rival: attention, or with ``backward`` value and gradients of its sum."""
    attend = make(case)
    (q, k, v), ids = case.operands()

    def total(*operands):
        return attend(*operands).astype(jnp.float32).sum()

    return (jax.value_and_grad(total, (0, 1, 2)) if case.backward else attend), (q, k, v, ids)


def measure(program: jax.stages.Compiled | Exception, operands, rounds: int) -> Measured:
    """Time a compiled program. Raises ValueError where it would not fit into memory, and what compiling it raised."""
    if isinstance(program, Exception):
        raise program
    temporary = program.memory_analysis().temp_size_in_bytes
    if temporary > MOST_MEMORY:
        raise ValueError(f"more than {MOST_MEMORY // MIB:,} MiB of memory")
    return Measured(seconds(program, operands, rounds, CALLS), temporary)


def plain_logits(hidden, kernel, targets):
    """Cross-entropy of all logits at once."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
    return jnp.where(targets < 0, 0.0, jax.nn.logsumexp(logits, axis=-1) - chosen).sum()


def summed(hidden, kernel, targets):
    """`linear_cross_entropy_sum`."""
    return linear_cross_entropy_sum(hidden, kernel, targets).loss


def each(hidden, kernel, targets):
    """`linear_cross_entropy`, which gives each token's."""
    return linear_cross_entropy(hidden, kernel, targets).loss.sum()


def line_of(
    label: str, name: str, found: Measured | None, reason: str, first: Measured | None, operations: float
) -> str:
    """Return a row of the table; ``first`` is ours, which the others are told as multiples of."""
    if found is None:
        return f"| {label} | {name} | {reason} | | | |"
    memory = "" if found.temporary is None else f"{found.temporary / MIB:,.0f}"
    rate = f"{operations / found.seconds / 1e12:.3g}" if operations else ""
    return (
        f"| {label} | {name} | {1e3 * found.seconds:,.2f} | {rate} | {memory} | {found.seconds / first.seconds:.2f} |"
    )


def compare(label: str, runs: list[tuple[str, Callable[[], Measured]]], operations: float = 0.0) -> None:
    """Print a line for each; the first is what the others are told as multiples of."""
    first = None
    for name, run in runs:
        try:
            found, reason = run(), ""
        except REFUSED as error:
            found, reason = None, f"does not run: {str(error).splitlines()[0][:100]}"
        first = first or found
        print(line_of(label, name, found, reason, first, operations), flush=True)


def title_of(function: Callable) -> str:
    return function.__doc__.strip().splitlines()[0].rstrip(".")


def table(title: str) -> None:
    print(f"\n{title}\n\n| tokens | what | ms | TFLOP/s | temporary memory, MiB | times ours |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")


def attention(cases: list[Case], rounds: int) -> None:
    """Print the lines of all cases; programs are compiled side by side, then timed one by one."""
    rivals = [ours_triton, ours_mosaic, xla, cudnn, jax_triton] if ON_GPU else [ours, xla]
    passes = [(rival, case, *attention_pass(rival, case)) for case in cases for rival in rivals]
    programs = compile_all([(function, operands) for _, _, function, operands in passes], REFUSED)
    for case in cases:
        runs = [
            (title_of(rival), lambda program=program, operands=operands: measure(program, operands, rounds))
            for (rival, of, _, operands), program in zip(passes, programs, strict=True)
            if of == case
        ]
        if importlib.util.find_spec("torch"):
            from tools import bench_torch

            runs += [
                (title_of(r), lambda r=r, case=case: Measured(*bench_torch.measure_attention(r, case, rounds, CALLS)))
                for r in bench_torch.ATTENTION
            ]
        compare(f"{case.S:,}", runs, case.operations)


def loss(tokens: int, hidden_size: int, vocabulary: int, dtype, of: int, rounds: int) -> None:
    """With one in ``of`` tokens supervised."""
    hidden = jax.random.normal(jax.random.key(0), (tokens, hidden_size), dtype)
    kernel = jax.random.normal(jax.random.key(1), (hidden_size, vocabulary), dtype) * hidden_size**-0.5
    targets = np.random.default_rng(0).integers(0, vocabulary, tokens)
    targets[np.arange(tokens) % of != 0] = -100
    operands = (hidden, kernel, jnp.asarray(targets))
    rivals = (summed, each, plain_logits)
    programs = compile_all([(jax.value_and_grad(rival, (0, 1)), operands) for rival in rivals], REFUSED)
    runs = [
        (title_of(rival), lambda program=program: measure(program, operands, rounds))
        for rival, program in zip(rivals, programs, strict=True)
    ]
    if importlib.util.find_spec("torch"):
        from tools import bench_torch

        sizes = targets, hidden_size, vocabulary, str(jnp.dtype(dtype))
        runs += [
            (title_of(rival), lambda rival=rival: Measured(*bench_torch.measure_loss(rival, *sizes, rounds, CALLS)))
            for rival in bench_torch.LOSSES
        ]
    supervised = int((targets >= 0).sum())
    compare(f"{tokens:,}, {supervised:,} supervised", runs, 6.0 * supervised * hidden_size * vocabulary)


def decoding(sequences: int, cache_len: int, rounds: int) -> None:
    """Time one new token of each sequence against full caches of 8 key heads, and print the bytes read a second."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (sequences, 1, 32, 128), "bfloat16")
    cache = [
        jax.random.normal(key, shape, "bfloat16")
        for key, shape in zip(keys[1:], ((sequences, 8, 128, cache_len), (sequences, 8, cache_len, 128)), strict=True)
    ]
    operands = (q, *cache, jnp.full(sequences, cache_len))
    names = (None, "xla")
    programs = compile_all(
        [
            (lambda q, k, v, n, name=name: decode_attention(q, (k, v), n, implementation=name), operands)
            for name in names
        ],
        REFUSED,
    )
    for name, program in zip(names, programs, strict=True):
        try:
            found = measure(program, operands, rounds)
        except REFUSED as error:
            print(f"| {sequences} x {cache_len:,} | {name} | does not run: {str(error).splitlines()[0][:100]} | |")
            continue
        rate = sum(x.nbytes for x in cache) / found.seconds / 1e12
        title = "`decode_attention`" + ("" if name is None else f", implementation {name}")
        print(f"| {sequences} x {cache_len:,} | {title} | {1e3 * found.seconds:.3f} | {rate:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--heads", type=int, nargs=3, metavar=("Q", "KV", "SIZE"), help="else by device: a CPU gets few"
    )
    arguments = parser.parse_args()
    dtype = "bfloat16" if ON_GPU else "float32"
    heads = tuple(arguments.heads or ((32, 8, 128) if ON_GPU else (8, 2, 64)))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {dtype}")
    for segment in (None, SEGMENT):
        for backward in (False, True):
            rows = f"segments of {SEGMENT}" if segment else "one segment"
            table(f"Attention, causal, {rows}, {heads[0]}/{heads[1]} heads of {heads[2]}, {PASSES[backward]}")
            attention([Case(S, heads, dtype, segment, backward) for S in arguments.lengths], arguments.rounds)
    if ON_GPU:
        for name, segment in (("images of 4,096 patches", 4096), ("windows of 64 patches", 64)):
            for backward in (False, True):
                table(f"Attention of the vision tower, {name}, 16 heads of 80, {PASSES[backward]}")
                attention([Case(16384, (16, 16, 80), dtype, segment, backward, causal=False)], arguments.rounds)
        print("\nDecoding, 32/8 heads of 128\n\n| sequences x cache | what | ms | TB/s |\n| --- | --- | ---: | ---: |")
        for sequences, cache_len in ((1, 32768), (64, 4096)):
            decoding(sequences, cache_len, arguments.rounds)
    sizes = (8192, 4096, 151936) if ON_GPU else (4096, 512, 32768)
    table(f"Loss, hidden size {sizes[1]:,}, a vocabulary of {sizes[2]:,}, forward and backward")
    for of in (1, 4):
        loss(*sizes, dtype, of, arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
