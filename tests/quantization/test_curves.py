"""Loss curves of LoRA on quantised bases beside that on the base as it is, from the same adapters and batches."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jvlm.adapters.attach import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import quantized_kernels
from jvlm.quantization.model import quantized
from jvlm.training import compiled_step, train_step, trainable
from jvlm.training.optimizer.config import OptimizerConfig
from jvlm.training.supervised import SupervisedTask
from jvlm.weights import hf
from tests.quantization.support import FOLDER, text_batch

STEPS, RATE = 60, 5e-3
ADAPTER = AdapterConfig(rank=8, alpha=16.0, targets=("decoder",))
# Format -> furthest that a loss may be from that of LoRA on the base itself, on average over the steps, in nats.
BOUNDS = {"int8": 0.005, "fp8": 0.03, "nf4": 0.07}


def _trained(model, batch, steps, rate) -> tuple[vlm.VLM, list[float]]:
    """The model after so many steps on one batch, and the loss before each."""
    template = nnx.merge(*jax.tree.map(lambda x: x, nnx.split(model)))
    batches = train_step.stack([batch])
    is_trainable = trainable.from_config(OptimizerConfig(), model.adapters)
    if model.adapters is None:
        is_trainable = trainable.everything
    step = compiled_step.build_step(
        template,
        SupervisedTask(),
        optax.adam(rate),
        batches,
        layout=MeshLayout.of(ParallelConfig(data=1), jax.devices()[:1]),
        is_trainable=is_trainable,
    )
    # copies: a step reuses the memory of what it is given
    state = step.init_state({p: np.asarray(v.get_value()) for p, v in vlm.variables(model).items()})
    losses = []
    for _ in range(steps):
        state, metrics = step.step(state, batches)
        losses.append(float(metrics["loss"]))
    return vlm.bind(template, state.params), losses


@pytest.fixture(scope="module")
def base():
    """The golden tiny model after it has learned something, so that its weights matter."""
    model = hf.load_weights(FOLDER, hf.read_config(FOLDER, Precision(compute_dtype="float32")))
    model, losses = _trained(model, text_batch(model, seed=0), STEPS, 1e-2)
    assert losses[-1] < 0.1 * losses[0]
    return model


def _curve(model) -> np.ndarray:
    """Losses of LoRA on two texts: one that the base has learned, and a new one."""
    known, new = text_batch(model, seed=0), text_batch(model, seed=1)
    batch = dataclasses.replace(known, tokens=np.stack([known.tokens[0], new.tokens[1]]))
    return np.asarray(_trained(attach(model, ADAPTER, seed=3), batch, STEPS, RATE)[1])


@pytest.fixture(scope="module")
def lora(base):
    return _curve(base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOUNDS)
def test_lora_on_a_quantised_base_learns_as_on_the_base_itself(base, lora, kind):
    found = _curve(quantized(base, QuantizationConfig(kind)))
    assert lora[-1] < 0.5 * lora[0]
    distance = np.abs(found - lora).mean()
    assert 0 < distance < BOUNDS[kind], (distance, found, lora)


@pytest.mark.slow
def test_a_base_of_wrong_codes_is_further_away_than_any_bound(base, lora):
    """Where the outputs of a matrix are in another order the curve is another: the comparison can fail."""
    model = quantized(base, QuantizationConfig("int8"))
    for _, kernel in quantized_kernels(model):
        kernel.codes.set_value(kernel.codes.get_value()[..., ::-1])
    found = _curve(model)
    assert np.abs(found - lora).mean() > 2 * max(BOUNDS.values())
