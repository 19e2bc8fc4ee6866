"""Loss and gradient of a quantised model on a mesh of four devices against one; prints JSON."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.models import device_ops, vlm
from jvlm.models.layers import Precision
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.sharded_ops import ShardedOps
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.model import quantized
from jvlm.training.starting_model import random_model
from jvlm.training.supervised import supervised_loss
from jvlm.weights import hf
from tests.parallel import models
from tests.quantization.support import FOLDER, text_batch, with_experts

CONFIGS = {"nf4x2": QuantizationConfig("nf4"), "int8": QuantizationConfig("int8")}


def _compiled(model, batch, ops):
    """The compiled loss and gradient by the embedding table."""
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    path = next(p for p in flat if p[-1] == "embedding")

    def loss(table, rest):
        with device_ops.use(ops):
            bound = [(p, v.replace(table) if p == path else v.replace(rest[p])) for p, v in flat.items()]
            return supervised_loss(nnx.merge(graph, nnx.from_flat_state(bound)), batch).total

    values = {p: v.get_value() for p, v in flat.items()}
    table = values.pop(path)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(table, values).compile()
    return compiled, compiled(table, values)


def experts() -> None:
    """The same of quantised experts, two on each of two devices along `expert`, stored over `fsdp`; prints JSON."""
    layout = MeshLayout.of(ParallelConfig(data=1, fsdp=2, expert=2))
    config = with_experts(4)
    plain = random_model(config, 0, None)
    batch = models.batch(config)
    found = {}
    for format, quantize in CONFIGS.items():
        _, (expected, table) = _compiled(quantized(plain, quantize), batch, None)
        model = quantized(plain, quantize, layout.parameter)
        _, (loss, gradient) = _compiled(model, batch, ShardedOps(layout))
        codes = vlm.parameters(model)["decoder.blocks.layer.mlp.gate.codes"].get_value()
        found[format] = {
            "loss": float(loss),
            "expected": float(expected),
            "gradient_difference": float(jnp.abs(np.asarray(gradient) - np.asarray(table)).max()),
            "largest": float(jnp.abs(table).max()),
            "shards": [
                whole // part for whole, part in zip(codes.shape, codes.addressable_shards[0].data.shape, strict=True)
            ],
        }
    print(json.dumps(found))


def main() -> None:
    layout = MeshLayout.of(ParallelConfig(data=1, fsdp=2, tensor=2))
    found = {}
    config = hf.read_config(FOLDER, Precision(compute_dtype="float32"))
    for format, quantize in CONFIGS.items():
        one = hf.load_weights(FOLDER, config, quantize=quantize)
        batch = text_batch(one)
        _, (expected, table) = _compiled(one, batch, None)
        model = hf.load_weights(FOLDER, config, layout.parameter, quantize=quantize)
        compiled, (loss, gradient) = _compiled(model, batch, ShardedOps(layout))
        codes = vlm.parameters(model)["decoder.blocks.layer.mlp.gate.kernel.codes"].get_value()
        gathers = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
        sizes = {}
        for dtype, shape in gathers:
            sizes.setdefault(dtype, []).append(int(np.prod([int(n) for n in shape.split(",")])))
        # a kernel of the layers has at least 32 x 64 weights, two a byte; scales and activations are smaller or float
        least = 32 * 64 // (2 if format == "nf4x2" else 1) // 2
        found[format] = {
            "loss": float(loss),
            "expected": float(expected),
            "gradient_difference": float(jnp.abs(np.asarray(gradient) - np.asarray(table)).max()),
            "sharded": not codes.sharding.is_fully_replicated,
            "gathered_kernels": [d for d, n in sizes.items() if max(n) >= least and d in ("u8", "s8", "bf16")],
        }
    print(json.dumps(found))
