"""One optimizer step, compiled once for the whole run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jvlm.models import device_ops, vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.training import optimizer
from jvlm.training.loss import loss_sums

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What changes from step to step. Frozen parameters are kept apart and never enter an update."""

    step: jax.Array
    params: Params
    optimizer: Any


Step = Callable[[TrainState, Params, PackedBatch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    template: VLM, tx: optax.GradientTransformation, *, ops: device_ops.DeviceOps | None = None, **options: Any
) -> Step:
    """``(state, frozen, batches) -> (state, metrics)``, with ``batches`` stacked on a leading accumulation axis.

    The loss is averaged over the weights of all accumulated batches, so it equals that of one large batch.
    ``state`` is donated. Metrics: loss, token_acc, grad_norm, a norm for each learnt tower, what layers report (a
    mixture of experts: aux_loss, which is minimised beside the loss, and router/...), and skipped: 1 where the loss or
    the gradient is not finite. Such a step leaves parameters and optimizer, its count included, as they were.

    Args:
      ops: operations of the mesh that splits the model; None is one device.
      options: of `jax.jit`: shardings of what goes in and comes out.
    """

    def sums(params: Params, frozen: Params, batch: PackedBatch):
        with device_ops.use(ops):
            result = loss_sums(vlm.bind(template, {**frozen, **params}), batch)
        return result["loss"] + result.get("aux/loss", 0.0), result

    gradient = jax.value_and_grad(sums, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0, **options)
    def step(state: TrainState, frozen: Params, batches: PackedBatch):
        if batches.tokens.shape[0] == 1:
            (_, total), grads = gradient(state.params, frozen, jax.tree.map(lambda x: x[0], batches))
        else:
            total, grads = _accumulate(gradient, state.params, frozen, batches)
        weight = jnp.maximum(total["weight"], 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        metrics = {
            "loss": total["loss"] / weight,
            "token_acc": total["correct"] / jnp.maximum(total["targets"], 1),
            "grad_norm": optax.tree.norm(grads),
            **{f"grad_norm/{tower}": norm for tower, norm in optimizer.tower_norms(grads).items()},
            **_reported(total, weight),
        }
        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.optimizer, state.params)
            new = (optax.apply_updates(state.params, updates), opt_state)
            # the norm is finite only if every gradient is
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            keep = functools.partial(jnp.where, finite)
            params, opt_state = jax.tree.map(keep, new, (state.params, state.optimizer))
        metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _reported(total: dict[str, jax.Array], weight: jax.Array) -> dict[str, jax.Array]:
    reports = {name.removeprefix("aux/"): value / weight for name, value in total.items() if name.startswith("aux/")}
    return {"aux_loss" if name == "loss" else name: value for name, value in reports.items()}


def _accumulate(gradient, params: Params, frozen: Params, batches: PackedBatch):
    def add(carry, batch):
        total, grads = carry
        (_, sums), new = gradient(params, frozen, batch)
        return (jax.tree.map(jnp.add, total, sums), jax.tree.map(jnp.add, grads, new)), None

    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(gradient, params, frozen, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][1], shapes[1]))
    return jax.lax.scan(add, zeros, batches)[0]


def stack(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Batches on a new leading axis, for accumulation."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
