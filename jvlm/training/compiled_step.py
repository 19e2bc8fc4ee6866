"""The training step of an experiment as a program: its compiled function, and the shape and place of all it touches.

Everything here is known from the experiment and the devices alone, which may be described and not present: the loop
runs the program, and a planner compiles the same one for a pod from shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from jvlm import families
from jvlm.data.packing import assemble
from jvlm.data.pipeline import check_shape, frame_patches
from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.sharded_ops import ShardedOps
from jvlm.training import optimizer, train_step
from jvlm.training.config import Experiment
from jvlm.training.train_step import Params, Step, TrainState


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The step, and abstract values with shardings for its arguments.

    Attributes:
      template: the model without arrays.
      learnt: path -> variable of the parameters that are learnt.
      step: jitted ``(state, frozen, batches) -> (state, metrics)``; `lower` it from the three fields below.
      state, frozen, batches: `jax.ShapeDtypeStruct` leaves. Batches have a leading accumulation axis.
    """

    layout: MeshLayout
    template: VLM
    learnt: Mapping[str, nnx.Variable]
    tx: optax.GradientTransformation
    step: Step
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batches: PackedBatch

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered from shapes."""
        return self.step.lower(self.state, self.frozen, self.batches)

    def begin(self, values: Params) -> tuple[TrainState, Params]:
        """(state before the first step, frozen parameters) from path -> array, each in its place."""
        params = {path: jax.device_put(values[path], self.state.params[path].sharding) for path in self.state.params}
        frozen = {path: jax.device_put(values[path], self.frozen[path].sharding) for path in self.frozen}

        def rest(params: Params):
            return jnp.zeros((), jnp.int32), self.tx.init(params)

        places = jax.tree.map(lambda x: x.sharding, (self.state.step, self.state.optimizer))
        step, state = jax.jit(rest, out_shardings=places)(params)
        return TrainState(step, params, state), frozen


def compile_step(experiment: Experiment, devices: Sequence[jax.Device] | None = None) -> CompiledStep:
    """The program of an experiment whose ``model`` is given, on devices (None: all there are).

    Raises:
      ValueError: a mesh that does not fit devices, rows or parameters; the message names which and how.
    """
    layout = MeshLayout.of(experiment.parallel, devices)
    template = vlm.abstract(experiment.model)
    variables = vlm.parameters(template)
    learnt = {p: v for p, v in variables.items() if optimizer.trainable(experiment.optimizer, p)}
    tx = optimizer.make(experiment.optimizer, experiment.steps or 1, learnt)
    values = {p: v.get_value() for p, v in variables.items()}
    optimizer_state = jax.eval_shape(tx.init, {p: values[p] for p in learnt})
    params = {p: _at(v, layout.parameter(p, variables[p])) for p, v in values.items()}
    state = TrainState(
        _at(jax.ShapeDtypeStruct((), jnp.int32), layout.replicated()),
        {p: params[p] for p in learnt},
        jax.tree.map(_at, optimizer_state, layout.optimizer(optimizer_state, variables)),
    )
    frozen = {p: v for p, v in params.items() if p not in learnt}
    batches = abstract_batches(experiment)
    batches = jax.tree.map(_at, batches, layout.batch(batches))
    places = jax.tree.map(lambda x: x.sharding, (state, frozen, batches))
    step = train_step.make_train_step(
        template,
        tx,
        ops=ShardedOps(layout) if layout.mesh.size > 1 else None,
        in_shardings=places,
        out_shardings=(places[0], layout.replicated()),
    )
    return CompiledStep(layout, template, learnt, tx, step, state, frozen, batches)


def _at(value: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def abstract_batches(experiment: Experiment) -> PackedBatch:
    """Shapes of what one step reads: ``accumulation`` batches of all rows."""
    data, settings = experiment.data, experiment.processor
    image_config = (settings and settings.image) or families.get(experiment.model.family).image_config
    images = image_config.build(experiment.model)
    check_shape(data)
    row = assemble(
        [[]],
        data.seq_len,
        data.max_patches,
        patch_values=images.patch_values,
        max_segment_length=data.max_length,
        max_image_patches=frame_patches(images, image_config, data),
    )
    first = (experiment.gradient_accumulation_steps, data.batch_size)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*first, *x.shape[1:]), x.dtype), row)
