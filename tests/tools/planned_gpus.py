"""Run by test_plan_gpu.py with the GPU compiler: a known program, and a training step, for GPUs that are not there."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jvlm_kernels import grouped_matmul

from jvlm.inference.abstract import BatchShape
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig, make_mesh
from jvlm.planning import generation, gpus, hlo
from jvlm.planning.chips import Topology
from jvlm.planning.measure import compile_step, devices_of, measure
from jvlm.planning.roofline import SegmentLengths, roofline
from tests.parallel import models
from tests.tools import planned_generation

STEPS, ROWS, WIDTH = 7, 256, 512


def main() -> None:
    json.dump({"known": known(), "refused": refused(), "step": step(), "products": products()} | grouped(), sys.stdout)


def known() -> dict:
    """Each turn gathers a weight over `fsdp`, which crosses two machines, multiplies, and sums over `tensor`."""
    topology = Topology.parse("h200:2x4")
    mesh = make_mesh(ParallelConfig(data=1, fsdp=4, tensor=2), devices_of(topology))

    def part(x, weights):
        def turn(x, weight):
            whole = lax.all_gather(weight, "fsdp", axis=0, tiled=True)
            return lax.pcast(jnp.tanh(lax.psum(x @ whole, "tensor")), "tensor", to="varying"), None

        return lax.scan(turn, x, weights)[0]

    split = jax.shard_map(
        part, mesh=mesh, in_specs=(P("fsdp", "tensor"), P(None, "fsdp")), out_specs=P("fsdp", "tensor")
    )
    arguments = (
        jax.ShapeDtypeStruct((4 * ROWS, 2 * WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", "tensor"))),
        jax.ShapeDtypeStruct((STEPS, WIDTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp"))),
    )
    found = measure(lambda: jax.jit(split).lower(*arguments), mesh, topology)
    axis_traffic = {one.axes: [dict(one.kinds), one.bandwidth, one.network] for one in found.axis_traffic}
    return {
        "flops": found.flops,
        "hbm": found.hbm,
        "fits": found.fits,
        "limit": found.limit,
        "axis_traffic": axis_traffic,
    }


def refused() -> list:
    """A product too large for an H100, whose arguments are not."""
    topology = Topology.parse("h100:1")
    mesh = make_mesh(ParallelConfig(), devices_of(topology))
    huge = jax.ShapeDtypeStruct((1 << 17, 1 << 13), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = measure(lambda: jax.jit(lambda x: jnp.sin(x) @ x.T).lower(huge), mesh, topology)
    return [found.fits, found.memory.peak]


def step() -> dict:
    """The training step of a small model on two machines of four, each row over four GPUs."""
    topology = Topology.parse("h200:2x4")
    experiment = models.experiment("qwen2_5_vl", ParallelConfig(data=1, fsdp=2, context=4))
    precision = dataclasses.replace(experiment.model.precision, compute_dtype="bfloat16", remat="attention")
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, precision=precision))
    found = compile_step(experiment, topology)
    parameters = vlm.parameters(vlm.abstract(experiment.model)).values()
    best = roofline(experiment, found, topology, SegmentLengths(conversation=128, image=48))
    axis_traffic = [[one.network, one.seconds] for one in found.axis_traffic]
    sizes = dataclasses.asdict(found.memory)
    return {
        **sizes,
        "axis_traffic": axis_traffic,
        "network": best.network,
        "count": sum(v.get_value().size for v in parameters),
    }


def products() -> int:
    """Matrix products in a step of decoding with two layers."""
    precision = Precision(param_dtype="bfloat16", compute_dtype="bfloat16")
    config = dataclasses.replace(models.qwen2_5_vl(), decoder=planned_generation.DECODER, precision=precision)
    asked, sizes = (
        ParallelConfig(tensor=8, rules="serving"),
        BatchShape(batch_size=32, prompt_len=16, max_patches=0, cache_len=128),
    )
    planned = generation.prepare(config, asked, Topology.parse("h200:8"), sizes)
    return planned.lower_decode().compile().as_text().count(" dot(")


def grouped() -> dict:
    """What experts' products and their gradients become: FLOP outside of kernels, and the kernels."""
    device = devices_of(Topology.parse("h200:1"))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = ((16384, 1024), jnp.bfloat16), ((8, 1024, 2048), jnp.bfloat16), ((8,), jnp.int32)
    arguments = (jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes)
    both = jax.grad(lambda x, matrices, sizes: jnp.square(grouped_matmul(x, matrices, sizes)).sum(), (0, 1))
    with gpus.compiling(device):
        text = jax.jit(both).lower(*arguments).compile().as_text()
    kernels = sorted(set(re.findall(r"(grouped_matmul_?\w*)/pallas_call", text)))
    return {"grouped": {"outside": hlo.read(text).flops, "kernels": kernels}}


if __name__ == "__main__":
    main()
