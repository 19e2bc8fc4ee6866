"""Run by test_ring_attention.py beside the TPU compiler: the schedule of ring attention on a v6e, as a line of JSON."""

from __future__ import annotations

import json
import os
import re

from jvlm.planning.environment import WITHOUT_A_TPU

os.environ.update(WITHOUT_A_TPU)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from jvlm_kernels.platforms import compiling_for

from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.sharded_ops import ShardedOps

_CALL = re.compile(
    r"\s*(?:ROOT )?%([\w\-]+)[\w.\-]* = .*? (collective-permute-start|collective-permute-done|custom-call)\("
)


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    layout = MeshLayout.of(ParallelConfig(data=1, context=4, ring_attention=True), devices)
    split = NamedSharding(layout.mesh, PartitionSpec(None, "context"))
    q, k, v = (jax.ShapeDtypeStruct((1, 8192, heads, 128), jnp.bfloat16, sharding=split) for heads in (8, 2, 2))
    segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=split)

    def total(q, k, v, segments):
        out = ShardedOps(layout).attention(q, k, v, segments, segments, along="sequence", causal=True)
        return out.astype(jnp.float32).sum()

    with compiling_for("tpu"):
        text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v, segments).compile().as_text()
    computations = []
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        calls = [match[1] for line in computation.splitlines() if (match := _CALL.match(line))]
        if any(name.startswith("segment_attention") for name in calls):
            computations.append(calls)
    print(json.dumps(computations))


if __name__ == "__main__":
    main()
