"""The training step as it is compiled: its function, and the shape and sharding of all it touches.

Everything here is known from shapes and devices alone, which may be described and not present: the trainer runs the
step, and the planner compiles the same one for a pod.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jvlm import families
from jvlm.adapters import targets
from jvlm.adapters.attach import structure
from jvlm.data.encode import image_patch_limit
from jvlm.data.packing import PackedSequences, assemble
from jvlm.data.pipeline import check_shape
from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.sharded_ops import ShardedOps
from jvlm.quantization.model import quantized_template
from jvlm.training import optimizer, train_step, trainable
from jvlm.training.config import Experiment
from jvlm.training.state import Params, TrainState
from jvlm.training.task import Loss, Task
from jvlm.training.trainable import IsTrainable
from jvlm.weights import labels

# An internal check of this pass fails on sums of gradients over micro-batches (libtpu 0.0.42); it would move their
# reductions behind the loop, where what is sharded is reduced to its shards within it anyway.
_ACCUMULATION_ON_TPU = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}

MakeOptimizer = Callable[[Mapping[str, nnx.Variable]], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The step, and abstract values with shardings for its arguments.

    Attributes:
      template: the model without arrays.
      trainable: path -> variable of the parameters that are trained.
      step: ``(state, batches) -> (state, metrics)``.
      evaluate: ``(trainable, constant state, batch) -> Loss``, of one micro-batch.
      state, batches: `jax.ShapeDtypeStruct` leaves. Batches have a leading accumulation axis.
      batch: one micro-batch, its accumulation axis of length 1.
      ops: operations of the mesh that splits the model; None is one device.
    """

    layout: MeshLayout
    template: VLM
    trainable: Mapping[str, nnx.Variable]
    tx: optax.GradientTransformation
    step: train_step.TrainStep
    evaluate: Callable[[Params, dict[str, Any], Any], Loss]
    state: TrainState
    batches: Any
    batch: Any
    ops: ShardedOps | None

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """Return the compiled ``(trainable, constant state, *arguments) -> function(model, *arguments)``, whose result
        every process has whole.

        Args:
          arguments: abstract, with shardings; their accumulation axes have length 1.
        """
        changing, constant = jax.tree.map(lambda x: x.sharding, self.state.split())
        given = (x for x in jax.tree.map(lambda x: x.sharding, arguments))
        return train_step.make_forward(
            self.template,
            function,
            ops=self.ops,
            in_shardings=(changing.trainable, constant, *given),
            out_shardings=self.layout.replicated(),
        )

    def lower(self) -> jax.stages.Lowered:
        """Lower the step from shapes."""
        return self.step.lower(self.state, self.batches)

    def init_state(self, values: Params) -> TrainState:
        """Return the state before the first step from path -> array, each array with its sharding."""
        put = lambda shapes: {p: jax.device_put(values[p], v.sharding) for p, v in shapes.items()}  # noqa: E731
        params, frozen = put(self.state.trainable), put(self.state.frozen)

        def rest(params: Params):
            reference = None if self.state.reference is None else jax.tree.map(jnp.copy, params)
            return jnp.zeros((), jnp.int32), self.tx.init(params), reference

        wanted = (self.state.step, self.state.opt_state, self.state.reference)
        step, opt_state, reference = jax.jit(rest, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))(params)
        return TrainState(step, params, opt_state, frozen, reference)


def build_step(
    template: VLM,
    task: Task,
    make_optimizer: optax.GradientTransformation | MakeOptimizer,
    batches: Any,
    *,
    layout: MeshLayout,
    is_trainable: IsTrainable = trainable.everything,
    seed: int = 0,
) -> CompiledStep:
    """Return the step of a task. Nothing is compiled before its first call.

    Args:
      make_optimizer: an optimizer, or what makes one from the variables that are trained.
      batches: shapes of what one step reads, [accumulation, sequences, ...].
      seed: of what the task draws in training.

    Raises:
      UserError: a mesh that does not fit devices, batch or parameters; nothing to train. The message names which.
    """
    variables = vlm.variables(template)
    chosen = trainable.select(is_trainable, variables)
    tx = make_optimizer
    if not isinstance(tx, optax.GradientTransformation):
        tx = make_optimizer(chosen)
    values = {p: v.get_value() for p, v in variables.items()}
    opt_state = jax.eval_shape(tx.init, {p: values[p] for p in chosen})
    params = {p: _abstract(v, layout.parameter(p, variables[p])) for p, v in values.items()}
    state = TrainState(
        _abstract(jax.ShapeDtypeStruct((), jnp.int32), layout.replicated()),
        {p: params[p] for p in chosen},
        jax.tree.map(_abstract, opt_state, layout.optimizer(opt_state, variables)),
        {p: v for p, v in params.items() if p not in chosen},
        {p: params[p] for p in chosen} if task.needs_reference else None,
    )
    batches = _with_shardings(batches, layout)
    batch = jax.tree.map(lambda x: _abstract(jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), x.sharding), batches)
    ops = ShardedOps(layout) if layout.mesh.size > 1 else None
    changing, constant = jax.tree.map(lambda x: x.sharding, state.split())
    shardings = jax.tree.map(lambda x: x.sharding, (batches, batch))
    options = {}
    accumulation = jax.tree.leaves(batches)[0].shape[0]
    if accumulation > 1 and layout.mesh.devices.flat[0].platform == "tpu":
        options["compiler_options"] = _ACCUMULATION_ON_TPU
    step = train_step.TrainStep(
        template,
        task,
        tx,
        seed=seed,
        ops=ops,
        **options,
        in_shardings=(changing, constant, shardings[0]),
        out_shardings=(changing, layout.replicated()),
    )
    evaluate = train_step.make_eval_step(
        template,
        task,
        ops=ops,
        in_shardings=(changing.trainable, constant, shardings[1]),
        out_shardings=layout.replicated(),
    )
    return CompiledStep(layout, template, chosen, tx, step, evaluate, state, batches, batch, ops)


def compile_step(experiment: Experiment, devices: Sequence[jax.Device] | None = None) -> CompiledStep:
    """Return the step of an experiment whose ``model`` is given, on devices (None: all there are).

    Raises:
      UserError: see `build_step`; patterns of ``optimizer.train`` or ``.freeze`` that match nothing.
    """
    layout = MeshLayout.of(experiment.parallel, devices)
    template = template_of(experiment)
    return build_step(template, **step_arguments(experiment, template), layout=layout)


def template_of(experiment: Experiment) -> VLM:
    """Return the abstract model of an experiment whose ``model`` is given: quantised and with adapters, as it says."""
    config, count = experiment.model, experiment.adapt.labels
    template = vlm.abstract(config if count is None else labels.with_count(config, count))
    if experiment.quantize is not None:
        template = quantized_template(template, experiment.quantize)
    if experiment.adapter is not None:
        # which tokens are trained changes no shape
        tokens = tuple(range(len(experiment.adapter.train_tokens)))
        template = structure(template, targets.resolve(experiment.adapter, template.config, tokens))
    return template


def step_arguments(experiment: Experiment, template: VLM) -> dict[str, Any]:
    """Return what an experiment says about its step, as arguments of `build_step` and of `Trainer`."""
    config, variables = experiment.optimizer, vlm.variables(template)
    trainable.check_patterns(config, variables)
    is_trainable = trainable.from_config(config, template.adapters)
    trainable.check_not_quantized(trainable.select(is_trainable, variables))
    experiment.task.check(experiment, template)
    return {
        "task": experiment.task,
        "make_optimizer": lambda variables: optimizer.make(config, experiment.steps or 1, variables),
        "batches": abstract_batches(experiment),
        "is_trainable": is_trainable,
        "seed": experiment.seed,
    }


def _abstract(value: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def _with_shardings(batches: Any, layout: MeshLayout) -> Any:
    """Add shardings to the shapes of batches, whose second axis counts packed sequences.

    Raises:
      UserError: sequences that the mesh does not divide.
    """
    names = layout.mesh_axes("batch")

    def of(node: Any) -> Any:
        if isinstance(node, PackedBatch):
            return jax.tree.map(_abstract, node, layout.batch(node))
        spec = PartitionSpec(None, names if names else None)
        return _abstract(node, NamedSharding(layout.mesh, spec))

    return jax.tree.map(of, batches, is_leaf=lambda node: isinstance(node, PackedBatch))


def abstract_batches(experiment: Experiment) -> Any:
    """Return the shapes of what one step reads: ``gradient_accumulation_steps`` batches of all packed sequences."""
    data, settings = experiment.data, experiment.processor
    image_config = (settings and settings.image) or families.get(experiment.model.family).image_config
    images = image_config.build(experiment.model)
    check_shape(data)
    empty = assemble(
        [[]],
        data.seq_len,
        data.max_patches,
        patch_values=images.patch_values,
        position_values=experiment.model.encoder.position_values,
        max_segment_length=data.max_length,
        max_image_patches=image_patch_limit(images, image_config, data),
    )
    first = (experiment.gradient_accumulation_steps, data.batch_size)
    batch = experiment.task.batch_of(PackedSequences(empty, 0, (), source_names=data.sources))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*first, *np.shape(x)[1:]), x.dtype), batch)
