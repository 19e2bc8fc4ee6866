"""The loop: batch, loss, gradient, update; everything else is a hook."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax

from jvlm.data.packing import PackedSequences
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.parallel import hosts
from jvlm.parallel.data_shards import data_shard_for, make_global_batch
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import optimizer, train_step, trainable
from jvlm.training.compiled_step import MakeOptimizer, build_step
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.state import Params, TrainState
from jvlm.training.supervised import SupervisedTask
from jvlm.training.task import Task
from jvlm.training.trainable import IsTrainable


class Trainer:
    """Trains a model on a task.

        model, processor = jvlm.load(folder)
        batches, _ = pipeline.training_data(processor, DataConfig(train=("examples.jsonl",)), seed=0)
        trainer = Trainer(model, SupervisedTask(), optax.adamw(1e-5), hooks=[MyHook()])
        trainer.fit(batches, steps=100)
        jvlm.save(trainer.model, processor, "tuned")

    Args:
      model: to start from; its arrays are not copied, and belong to the trainer afterwards.
      make_optimizer: an optax optimizer, or what makes one from path -> variable of the trainable parameters.
      batches: shapes of what a step reads, [accumulation, sequences, ...]; None takes them from the first batch.
      is_trainable: which parameters are trained, from path and variable.
      layout: the mesh; None puts all on the first device.
      seed: of what the task draws in training.
      use_ema: measure and export the moving average of the parameters, where the optimizer keeps one.
      hooks: see `Hook` for their order.

    Attributes:
      state: after the last step.
      step: steps run, those before a restart included.
      start: steps run before this start.
      steps: how many there are to be.
      accumulation: micro-batches of a step. A hook may change it before a step; each number is compiled once.
      stop_reason: why it stops before that; None while it does not.
      finished: whether stopping early is its end, and not an interruption that a restart goes on from.
      save_requested: a hook wants this step saved.
      waited: seconds the last batch was waited for.
    """

    def __init__(
        self,
        model: VLM,
        task: Task = SupervisedTask(),
        make_optimizer: optax.GradientTransformation | MakeOptimizer = optax.adamw(1e-5),
        *,
        batches: Any = None,
        is_trainable: IsTrainable = trainable.everything,
        layout: MeshLayout | None = None,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        use_ema: bool = True,
        hooks: Sequence[Hook] = (),
    ):
        self.task, self.hooks, self.use_ema = task, tuple(hooks), use_ema
        self.layout = layout or MeshLayout.of(ParallelConfig(data=1), jax.devices()[:1])
        self.template, values = split(model)
        self.accumulation = gradient_accumulation_steps
        self._build = lambda batches: build_step(
            self.template, task, make_optimizer, batches, layout=self.layout, is_trainable=is_trainable, seed=seed
        )
        self._values = values
        self.compiled = None
        self.state: TrainState | None = None
        if batches is not None:
            self._prepare(batches)
        self.step = self.start = self.steps = 0
        self.stop_reason: str | None = None
        self.finished = self.save_requested = False
        self.waited = 0.0

    def _prepare(self, batches: Any) -> None:
        self.compiled = self._build(batches)
        self.accumulation = jax.tree.leaves(batches)[0].shape[0]
        self.shard = data_shard_for(jax.tree.leaves(self.compiled.batches)[0])
        self.state = self.compiled.init_state(self._values)
        self._values = None

    @property
    def model(self) -> VLM:
        """The model as it is now. It shares its arrays with the trainer: read it between steps."""
        return vlm.bind(self.template, self.state.params)

    def evaluated_params(self) -> Params:
        """Return the trainable parameters to measure and to export: their moving average, if it is asked for."""
        average = optimizer.ema_of(self.state.opt_state, self.state.trainable) if self.use_ema else None
        return self.state.trainable if average is None else average

    def fit(self, batches: Iterable[PackedSequences], *, steps: int) -> TrainState:
        """Run until ``steps`` steps are behind, those before a restart included, or until a hook stops it.

        Args:
          batches: this process's share of each batch. To be restored with a checkpoint, its iterator needs the
            ``get_state`` and ``set_state`` of Grain's.
        """
        self._batches, self._peeked, self.steps = iter(batches), [], steps
        self.stop_reason, self.finished = None, False
        names = [hook.name for hook in self.hooks]
        if len(set(names)) < len(names):
            raise UserError(f"hooks need a name each, got {', '.join(names)}: override Hook.name")
        with contextlib.ExitStack() as stack:
            if self._batches is not batches and hasattr(self._batches, "close"):
                stack.callback(self._batches.close)
            if self.compiled is None:
                self._peeked = [next(self._batches)]
                first = self.task.batch_of(self._peeked[0])
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.accumulation, *x.shape), x.dtype), first)
                self._prepare(shapes)
            for hook in self.hooks:
                hook.on_train_start(self)
                stack.push(lambda kind, error, trace, hook=hook: hook.on_stop(self, error))
            self.start = self.step
            while self.step < self.steps and self.stop_reason is None:
                self._run_step()
        return self.state

    def _run_step(self) -> None:
        for hook in self.hooks:
            hook.on_step_start(self)
        began = time.perf_counter()
        packed = list(itertools.islice(itertools.chain(self._peeked, self._batches), self.accumulation))
        self._peeked = []
        self.waited = time.perf_counter() - began
        if len(packed) < self.accumulation:
            raise UserError(f"the data ended after {self.step} of {self.steps} steps; run fewer, or repeat the data")
        for hook in self.hooks:
            hook.on_batch(self, packed)
        local = train_step.stack([self.task.batch_of(one) for one in packed])
        batch, began = make_global_batch(local, self.shard, self.shapes_of(len(packed))), time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, metrics = self.compiled.step(self.state, batch)
        self.step += 1
        self.save_requested = False
        result = StepResult(self.step, packed, metrics, began)
        for hook in reversed(self.hooks):
            hook.on_step_end(self, result)

    def shapes_of(self, accumulation: int) -> Any:
        """Return the shapes of the global batch of a step of so many micro-batches."""

        def of(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((accumulation, *x.shape[1:]), x.dtype, sharding=x.sharding)

        return jax.tree.map(of, self.compiled.batches)

    def stop(self, reason: str, *, finished: bool = False) -> None:
        """Stop after this step. ``finished``: the run is complete, and a restart does not go on."""
        if self.stop_reason is None:
            self.stop_reason, self.finished = reason, finished

    def data_position(self) -> list[Any]:
        """Return where all processes are in their data, for a checkpoint; every process must call it."""
        known = hasattr(self._batches, "get_state") and self.shard.is_primary_reader
        position = self._batches.get_state() if known else []
        return hosts.all_gather_concat(position)

    def restore_data(self, position: list[Any]) -> None:
        """Go on from a `data_position`."""
        if hasattr(self._batches, "set_state"):
            self._batches.set_state(position)
            self._peeked = []

    def request_save(self) -> None:
        """Have this step saved, where checkpoints are written at all. Call it from `Hook.on_step_end`."""
        self.save_requested = True

    def is_due(self, step: int) -> bool:
        """Return whether any hook reads metrics or parameters of this step."""
        return any(hook.is_due(self, step) for hook in self.hooks)

    def evaluated(self, values: dict[str, float]) -> None:
        """Tell all hooks the values of an evaluation."""
        for hook in self.hooks:
            hook.on_evaluation(self, values)


def split(model: VLM) -> tuple[VLM, dict[str, jax.Array]]:
    """Return (template without arrays, path -> array)."""
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}
    return vlm.bind(model, {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in values.items()}), values
