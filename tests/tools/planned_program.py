"""Run by test_plan.py with libtpu: a program whose traffic is known, compiled for a TPU that is not there."""

import json
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jvlm_kernels import platforms

from jvlm.parallel.mesh import ParallelConfig, make_mesh
from jvlm.planning.chips import Topology
from jvlm.planning.measure import available_memory, devices_of, measure

STEPS, ROWS, WIDTH = 7, 256, 512


def main() -> None:
    topology = Topology.parse("v5e:4x4")
    devices = devices_of(topology)
    mesh = Mesh(mesh_utils.create_device_mesh((4, 4), devices), ("outer", "inner"))

    def part(x, weights):
        """Each turn gathers a weight over `outer`, multiplies, and sums over `inner`."""

        def turn(x, weight):
            whole = lax.all_gather(weight, "outer", axis=0, tiled=True)
            return lax.pcast(jnp.tanh(lax.psum(x @ whole, "inner")), "inner", to="varying"), None

        return lax.scan(turn, x, weights)[0]

    split = jax.shard_map(
        part, mesh=mesh, in_specs=(P("outer", "inner"), P(None, "outer")), out_specs=P("outer", "inner")
    )
    arguments = (
        jax.ShapeDtypeStruct((4 * ROWS, 4 * WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("outer", "inner"))),
        jax.ShapeDtypeStruct((STEPS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(None, "outer"))),
    )
    found = measure(lambda: jax.jit(split).lower(*arguments), mesh, topology)
    huge = jax.ShapeDtypeStruct((1 << 18, 1 << 16), jnp.float32, sharding=NamedSharding(mesh, P()))
    refused = measure(lambda: jax.jit(lambda x: jnp.sin(x) @ x.T).lower(huge), mesh, topology)
    x = jax.ShapeDtypeStruct((1 << 11, 1 << 11), jnp.float32, sharding=NamedSharding(mesh, P()))
    unread = jax.ShapeDtypeStruct((1 << 12, 1 << 12), jnp.float32, sharding=NamedSharding(mesh, P()))
    targets = []

    def lower():
        targets.append(platforms.target_platform())
        return jax.jit(lambda x, unread: jnp.tanh(jnp.tanh(x) @ x) @ x).lower(x, unread)

    size = {name: float(4 * one.size) for name, one in (("x", x), ("unread", unread))}
    partly = measure(lower, mesh, topology, parameters=sum(size.values()))
    axis_traffic = {
        one.axes: {"kinds": dict(one.kinds), "bandwidth": one.bandwidth, "network": one.network}
        for one in found.axis_traffic
    }
    answer = {
        "flops": found.flops,
        "hbm": found.hbm,
        "fits": found.fits,
        "compiler": found.compiler,
        "unread": found.unread,
        "peak": found.memory.peak,
        "axis_traffic": axis_traffic,
        "mesh": dict(found.mesh),
    }
    limit = available_memory(topology, devices[0])
    answer |= {"targets": targets, "unread argument": [partly.memory.temporary, size["x"]]}
    answer |= {"limit": limit, "refused": [refused.fits, refused.memory.peak], "slices": two_slices()}
    json.dump(answer, sys.stdout)


def two_slices() -> list[dict]:
    """What a sum over `data` sends, whose two devices are in slices of their own."""
    topology = Topology.parse("v5e:2x2*2")
    mesh = make_mesh(ParallelConfig(data=2, fsdp=4), devices_of(topology))
    summed = jax.shard_map(lambda x: lax.psum(x, "data"), mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P("fsdp"))
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    argument = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=sharding)
    found = measure(lambda: jax.jit(summed).lower(argument), mesh, topology)
    return [{"axes": one.axes, "kinds": dict(one.kinds), "network": one.network} for one in found.axis_traffic]


if __name__ == "__main__":
    main()
