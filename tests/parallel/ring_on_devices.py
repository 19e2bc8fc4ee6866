"""Run by test_ring_attention.py in a process with 8 CPU devices: ring attention, beside a mask in memory."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels import reference_attention

from jvlm.parallel import collectives, ring_attention
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.sharded_ops import ShardedOps

B, S, H, K, D = 2, 192, 4, 2, 16


@dataclass(frozen=True)
class Case:
    """Lengths of the segments of each of two rows (what is left is padding), the mesh, and arguments of attention."""

    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    mesh: tuple[tuple[str, int], ...] = (("context", 4),)
    arguments: tuple[tuple[str, object], ...] = (("causal", True),)

    @property
    def shards(self) -> int:
        return dict(self.mesh)["context"]

    @property
    def ways(self) -> int:
        return 1 if dict(self.arguments).get("causal") else 2

    def reach(self) -> int:
        """Shards between the first and the last position that a query attends to, position by position."""
        size, most = -(-S // self.shards), 0
        window = dict(self.arguments).get("window") or S
        for lengths in self.lengths:
            ends = np.minimum(np.cumsum(lengths), S)
            for first, end in zip((0, *ends[:-1]), ends, strict=True):
                for query in range(first, end):
                    most = max(most, query // size - max(first, query - window + 1) // size)
        return most


LONG, SHORT = (S - 7,), (30, 41, 12, 60, 9, 25)
CAUSAL, BOTH = (("causal", True),), ()
CASES = {
    "one_segment": Case((LONG, LONG)),
    "one_segment_both_ways": Case((LONG, LONG), arguments=BOTH),
    "one_row_long": Case((LONG, SHORT)),
    "short": Case((SHORT, (48, 48, 48, 48))),
    "short_both_ways": Case((SHORT, (100, 90)), arguments=BOTH),
    "within_shards": Case(((48, 48, 48, 40), (20, 28, 48, 48, 40))),
    "eight_shards": Case((LONG, SHORT), (("context", 8),)),
    "eight_shards_half_way": Case(((100, 92), (90, 60, 42)), (("context", 8),)),
    "two_rows_apart": Case((LONG, SHORT), (("data", 2), ("context", 4))),
    "split_heads": Case(((70, 80), SHORT), (("context", 2), ("tensor", 4))),
    "window": Case((LONG, SHORT), arguments=(("causal", True), ("window", 60))),
    "window_both_ways": Case((LONG, SHORT), arguments=(("window", 100),)),
    "promised_length": Case((SHORT, SHORT), (("context", 8),), (("causal", True), ("max_segment_length", 60))),
    "uneven": Case(((100, 60), SHORT), (("context", 5),)),
}


def arrays(case: Case):
    """(q, k, v, segments, weights of the outputs)."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, S, heads, D)), jnp.float32) for heads in (H, K, K))
    segments = np.zeros((B, S), np.int32)
    for row, lengths in enumerate(case.lengths):
        ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[:S]
        segments[row, : len(ids)] = ids
    return q, k, v, jnp.asarray(segments), jnp.asarray(rng.standard_normal(q.shape), jnp.float32)


def run(case: Case):
    """Return ((value, gradients), the same of attention with a mask in memory, collectives, shards sent)."""
    q, k, v, segments, weights = arrays(case)
    sizes = {"data": 1, **dict(case.mesh)}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    layout = MeshLayout.of(ParallelConfig(**sizes, ring_attention=True), devices)
    ops, arguments = ShardedOps(layout), dict(case.arguments)

    def of(attention):
        return jax.jit(jax.value_and_grad(lambda *x: (attention(*x) * weights).sum(), (0, 1, 2)))

    sent, shift = [], ring_attention._shifted

    def counted(*arguments):
        jax.debug.callback(lambda: sent.append(1))
        return shift(*arguments)

    ours = of(lambda q, k, v: ops.attention(q, k, v, segments, segments, along="sequence", **arguments))
    compiled = ours.lower(q, k, v).compile()
    ring_attention._shifted = counted
    try:
        jax.clear_caches()
        jax.block_until_ready(ours(q, k, v))
        jax.effects_barrier()
    finally:
        ring_attention._shifted = shift
    shown = {name: value for name, value in arguments.items() if name != "max_segment_length"}
    theirs = of(lambda q, k, v: reference_attention(q, k, v, segments, segments, **shown)[0])
    return compiled(q, k, v), theirs(q, k, v), collectives.listing(compiled.as_text(), layout.mesh), len(sent)


def main(*names: str) -> None:
    """Write a JSON line for each case: its name, its collectives, shards sent, and a traceback or None."""
    for name in names or CASES:
        error, listed, sent = None, [], 0
        try:
            ours, theirs, listed, sent = run(CASES[name])
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5)
        except Exception:  # noqa: BLE001  (the test shows it)
            error = traceback.format_exc()
        print(json.dumps([name, listed, sent, error]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
