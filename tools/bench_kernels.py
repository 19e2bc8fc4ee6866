"""Time and memory of the kernels on the device at hand, against what JAX and torch offer, as ratios of one run.

    make bench-kernels

Attention: one causal conversation that fills the row, and rows packed with segments of 512 tokens, over growing rows;
the cost of packed rows should grow linearly. Forward alone, and forward and backward. Operations a second count visible
pairs alone: 4 x pairs x heads x head size forward, 2.5 times that backward. Loss: value and both gradients, with all
tokens learnt and with every fourth (a row of pictures and questions), and only those count as operations.

Temporary memory is what is reserved besides arguments and results. torch takes part where it is installed (its
variable-length attention on GPUs alone). What cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention as pallas_triton
from jvlm_kernels import linear_cross_entropy, linear_cross_entropy_sum, segment_attention
from timing import seconds

SEGMENT = 512
MOST_MEMORY = 8 << 30
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """Causal attention of one row: heads are query heads, key heads and head size."""

    S: int
    heads: tuple[int, int, int]
    dtype: str
    packed: bool
    backward: bool

    @property
    def lengths(self) -> list[int]:
        """Of the row's segments."""
        return [min(SEGMENT, self.S - first) for first in range(0, self.S, SEGMENT)] if self.packed else [self.S]

    @property
    def operations(self) -> float:
        pairs = sum(n * (n + 1) / 2 for n in self.lengths)
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
    return lambda q, k, v, ids: segment_attention(q, k, v, ids, ids, causal=True)


def ours_mosaic(case: Case) -> Callable:
    """`segment_attention`, implementation mosaic_gpu."""
    return lambda q, k, v, ids: segment_attention(q, k, v, ids, ids, causal=True, implementation="mosaic_gpu")


def xla(case: Case) -> Callable:
    """`jax.nn.dot_product_attention`, XLA."""
    return _dot_product_attention(case, "xla")


def cudnn(case: Case) -> Callable:
    """`jax.nn.dot_product_attention`, cuDNN (a mask as a bias in memory where rows are packed)."""
    return _dot_product_attention(case, "cudnn")


def _dot_product_attention(case: Case, implementation: str) -> Callable:
    def attend(q, k, v, ids):
        mask = (ids[:, :, None] == ids[:, None])[:, None] if case.packed else None
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)

    return attend


def jax_triton(case: Case) -> Callable:
    """JAX's Pallas Triton attention, keys repeated."""
    H, K, D = case.heads

    def attend(q, k, v, ids):
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        return pallas_triton.mha(q, k, v, ids if case.packed else None, sm_scale=D**-0.5, causal=True)

    return attend


def measure_attention(make: Callable, case: Case, rounds: int) -> Measured:
    """Raises ValueError where it would not fit into memory."""
    attend = make(case)
    (q, k, v), ids = case.operands()

    def total(*operands):
        return attend(*operands).astype(jnp.float32).sum()

    function = jax.value_and_grad(total, (0, 1, 2)) if case.backward else attend
    return measure(function, (q, k, v, ids), rounds)


def measure(function: Callable, operands, rounds: int) -> Measured:
    """Raises ValueError where it would not fit into memory."""
    program = jax.jit(function).lower(*operands).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    if temporary > MOST_MEMORY:
        raise ValueError(f"more than {MOST_MEMORY // MIB:,} MiB of memory")
    return Measured(seconds(program, operands, rounds), temporary)


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
    """A row of the table; ``first`` is ours, which the others are told as multiples of."""
    if found is None:
        return f"| {label} | {name} | {reason} | | | |"
    memory = "" if found.temporary is None else f"{found.temporary / MIB:,.0f}"
    rate = f"{operations / found.seconds / 1e12:.3g}" if operations else ""
    return (
        f"| {label} | {name} | {1e3 * found.seconds:,.2f} | {rate} | {memory} | {found.seconds / first.seconds:.2f} |"
    )


def compare(label: str, runs: list[tuple[str, Callable[[], Measured]]], operations: float = 0.0) -> None:
    """Print a row for each; ours comes first."""
    first = None
    for name, run in runs:
        try:
            found, reason = run(), ""
        except (ValueError, NotImplementedError, RuntimeError) as error:
            found, reason = None, f"does not run: {str(error).splitlines()[0][:100]}"
        first = first or found
        print(line_of(label, name, found, reason, first, operations), flush=True)


def title_of(function: Callable) -> str:
    return function.__doc__.strip().splitlines()[0].rstrip(".")


def table(title: str) -> None:
    print(f"\n{title}\n\n| tokens | what | ms | TFLOP/s | temporary memory, MiB | times ours |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")


def attention(case: Case, rounds: int) -> None:
    on_gpu = jax.default_backend() == "gpu"
    rivals = [ours, *([ours_mosaic] if on_gpu else []), xla, *([cudnn, jax_triton] if on_gpu else [])]
    runs = [(title_of(rival), lambda rival=rival: measure_attention(rival, case, rounds)) for rival in rivals]
    if importlib.util.find_spec("torch"):
        import bench_torch

        runs += [
            (title_of(rival), lambda rival=rival: Measured(*bench_torch.measure_attention(rival, case, rounds)))
            for rival in bench_torch.ATTENTION
        ]
    compare(f"{case.S:,}", runs, case.operations)


def loss(tokens: int, hidden_size: int, vocabulary: int, dtype, of: int, rounds: int) -> None:
    """With one in ``of`` tokens learnt."""
    hidden = jax.random.normal(jax.random.key(0), (tokens, hidden_size), dtype)
    kernel = jax.random.normal(jax.random.key(1), (hidden_size, vocabulary), dtype) * hidden_size**-0.5
    targets = np.random.default_rng(0).integers(0, vocabulary, tokens)
    targets[np.arange(tokens) % of != 0] = -100

    def run(function: Callable) -> Measured:
        gradients = jax.value_and_grad(function, (0, 1))
        return measure(gradients, (hidden, kernel, jnp.asarray(targets)), rounds)

    runs = [(title_of(rival), lambda rival=rival: run(rival)) for rival in (summed, each, plain_logits)]
    if importlib.util.find_spec("torch"):
        import bench_torch

        sizes = targets, hidden_size, vocabulary, str(jnp.dtype(dtype))
        runs += [
            (title_of(rival), lambda rival=rival: Measured(*bench_torch.measure_loss(rival, *sizes, rounds)))
            for rival in bench_torch.LOSSES
        ]
    learnt = int((targets >= 0).sum())
    compare(f"{tokens:,}, {learnt:,} learnt", runs, 6.0 * learnt * hidden_size * vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--heads", type=int, nargs=3, metavar=("Q", "KV", "SIZE"), help="else by device: a CPU gets few"
    )
    arguments = parser.parse_args()
    small = jax.default_backend() == "cpu"
    dtype = "float32" if small else "bfloat16"
    heads = tuple(arguments.heads or ((8, 2, 64) if small else (32, 8, 128)))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {dtype}")
    for packed in (False, True):
        for backward in (False, True):
            rows = f"segments of {SEGMENT}" if packed else "one segment"
            passes = "forward and backward" if backward else "forward"
            table(f"Attention, causal, {rows}, {heads[0]}/{heads[1]} heads of {heads[2]}, {passes}")
            for S in arguments.lengths:
                attention(Case(S, heads, dtype, packed, backward), arguments.rounds)
    sizes = (4096, 512, 32768) if small else (8192, 4096, 151936)
    table(f"Loss, hidden size {sizes[1]:,}, a vocabulary of {sizes[2]:,}, forward and backward")
    for of in (1, 4):
        loss(*sizes, dtype, of, arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
