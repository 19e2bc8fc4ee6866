"""One optimizer step, compiled once for the whole run, and its counterpart that only measures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jvlm.adapters import steps as adapter_steps
from jvlm.models import device_ops, vlm
from jvlm.models.vlm import VLM
from jvlm.training import optimizer
from jvlm.training.state import Params, TrainState
from jvlm.training.task import Loss, Mean, Task

Metrics = dict[str, jax.Array]
SOURCES = "sources"


class TrainStep:
    """``(state, batches) -> (state, metrics)``; ``batches`` have a leading axis of gradient accumulation.

    The loss is averaged over the weights of all accumulated batches, so it equals that of one large batch. The changing
    part of ``state`` is donated. Metrics: loss, what the task measures, grad_norm, a norm for each tower that is
    trained, and skipped: 1 where the loss or the gradient is not finite. Such a step leaves parameters and optimizer,
    its count included, as they were. `SOURCES`, the only one that is no number, has the sums of each data source.

    Args:
      seed: of what tasks draw in training.
      ops: operations of the mesh that splits the model; None is one device.
      in_shardings: of (changing state, constant state, batches), see `TrainState.split`.
      out_shardings: of (changing state, metrics).
    """

    def __init__(
        self,
        template: VLM,
        task: Task,
        tx: optax.GradientTransformation,
        *,
        seed: int = 0,
        ops: device_ops.DeviceOps | None = None,
        **options: Any,
    ):
        loss_of, norms_of = _loss_of(template, task, ops), _norms_of(template, ops)
        update = functools.partial(_update, loss_of, norms_of, task.denominators, tx, seed, task.measures_update)
        self._jitted = jax.jit(update, donate_argnums=0, **options)

    def __call__(self, state: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        changing, constant = state.split()
        changing, metrics = self._jitted(changing, constant, batches)
        return changing.merge(constant), metrics

    def lower(self, state: TrainState, batches: Any) -> jax.stages.Lowered:
        """Lower the function of (changing state, constant state, batches); arrays may be abstract."""
        return self._jitted.lower(*state.split(), batches)

    @property
    def compilations(self) -> int:
        """How often it was compiled."""
        return self._jitted._cache_size()


def make_eval_step(
    template: VLM, task: Task, *, ops: device_ops.DeviceOps | None = None, **options: Any
) -> Callable[[Params, dict[str, Any], Any], Loss]:
    """Return the compiled ``(trainable, constant state, batch) -> Loss``, without a gradient.

    ``batch`` has an axis of gradient accumulation, of length 1. ``options`` are those of `jax.jit`.
    """
    loss_of, norms_of = _loss_of(template, task, ops), _norms_of(template, ops)

    def evaluate(trainable: Params, constant: dict[str, Any], batch: Any) -> Loss:
        norms = norms_of(trainable, constant)
        denominators = task.denominators(batch)
        return loss_of(trainable, constant, norms, jax.tree.map(lambda x: x[0], batch), None, denominators)

    return jax.jit(evaluate, **options)


def make_forward(
    template: VLM, function: Callable[..., Any], *, ops: device_ops.DeviceOps | None = None, **options: Any
) -> Callable[..., Any]:
    """Return the compiled ``(trainable, constant state, *arguments) -> function(model, *arguments)``.

    Arguments have an axis of gradient accumulation, of length 1, which the function does not see. ``options`` are those
    of `jax.jit`.
    """
    norms_of = _norms_of(template, ops)

    def forward(trainable: Params, constant: dict[str, Any], *arguments: Any) -> Any:
        norms = norms_of(trainable, constant)
        with device_ops.use(ops):
            model = adapter_steps.prepare(vlm.bind(template, {**constant["frozen"], **trainable}), norms, None)
            return function(model, *jax.tree.map(lambda x: x[0], arguments))

    return jax.jit(forward, **options)


def _loss_of(
    template: VLM, task: Task, ops: device_ops.DeviceOps | None
) -> Callable[[Params, dict[str, Any], adapter_steps.Norms, Any, jax.Array | None, Any], Loss]:
    def loss(
        trainable: Params,
        constant: dict[str, Any],
        norms: adapter_steps.Norms,
        batch: Any,
        rng: jax.Array | None,
        denominators: Any,
    ) -> Loss:
        frozen, reference = constant["frozen"], constant["reference"]
        with device_ops.use(ops):
            extra = {}
            if task.needs_reference:
                # frozen parameters stay the same arrays, by which a task sees what both models compute alike
                extra["reference"] = vlm.bind(template, {**frozen, **jax.lax.stop_gradient(reference)})
            if denominators is not None:
                extra["denominators"] = denominators
            dropout = rng if task.uses_dropout else None
            model = adapter_steps.prepare(vlm.bind(template, {**frozen, **trainable}), norms, dropout)
            return task.loss(model, batch, rng=rng, **extra)

    return loss


def _norms_of(
    template: VLM, ops: device_ops.DeviceOps | None
) -> Callable[[Params, dict[str, Any]], adapter_steps.Norms]:
    def norms(trainable: Params, constant: dict[str, Any]) -> adapter_steps.Norms:
        with device_ops.use(ops):
            return adapter_steps.norms(vlm.bind(template, {**constant["frozen"], **trainable}))

    return norms


def _update(
    loss_of: Callable[..., Loss],
    norms_of: Callable[[Params, dict[str, Any]], adapter_steps.Norms],
    denominators_of: Callable[[Any], Any],
    tx: optax.GradientTransformation,
    seed: int,
    measures_update: bool,
    state: TrainState,
    constant: dict[str, Any],
    batches: Any,
) -> tuple[TrainState, Metrics]:
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    norms = norms_of(state.trainable, constant)
    denominators = denominators_of(batches)

    def total(trainable: Params, batch: Any, number: jax.Array | int) -> tuple[jax.Array, Loss]:
        loss = loss_of(trainable, constant, norms, batch, jax.random.fold_in(rng, number), denominators)
        return loss.total, loss

    gradient = jax.grad(total, has_aux=True)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        grads, loss = gradient(state.trainable, jax.tree.map(lambda x: x[0], batches), 0)
    else:
        grads, loss = _accumulate(gradient, state.trainable, batches)
    weight = jnp.maximum(loss.weight, 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    mean_loss = loss.total / weight
    metrics = {
        "loss": mean_loss,
        **means(loss.metrics),
        **({} if loss.sources is None else {SOURCES: loss.sources}),
        "grad_norm": optax.tree.norm(grads),
        **{f"grad_norm/{tower}": norm for tower, norm in optimizer.tower_norms(grads).items()},
    }
    with jax.named_scope("update"):
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = (optax.apply_updates(state.trainable, updates), opt_state)
        if measures_update:
            metrics["update_norm"] = optax.tree.norm(updates)
            metrics["parameter_norm"] = optax.tree.norm(state.trainable)
        # the norm is finite only if every gradient is
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(metrics["grad_norm"])
        choose = functools.partial(jnp.where, finite)
        trainable, opt_state = jax.tree.map(choose, new, (state.trainable, state.opt_state))
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    return TrainState(state.step + 1, trainable, opt_state), metrics


def means(metrics: Mapping[str, Mean]) -> Metrics:
    """Divide each sum by its count; 0 where nothing was counted."""
    return {name: mean.sum / jnp.maximum(mean.count, 1e-9) for name, mean in metrics.items()}


def _accumulate(gradient: Callable[..., tuple[Params, Loss]], trainable: Params, batches: Any) -> tuple[Params, Loss]:
    def add(total, numbered):
        number, batch = numbered
        return jax.tree.map(jnp.add, total, gradient(trainable, batch, number)), None

    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(gradient, trainable, first, 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    count = jax.tree.leaves(batches)[0].shape[0]
    return jax.lax.scan(add, zeros, (jnp.arange(count), batches))[0]


def stack(batches: Sequence[Any]) -> Any:
    """Stack batches on a new leading axis, for accumulation."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
