"""A step of a run once more, from what is stored of it: rewards' weights, log-probabilities, loss and gradient."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jvlm
from jvlm import config as config_tree
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.json_files import read_object
from jvlm.models.vlm import VLM
from jvlm.parallel.data_shards import make_global_batch
from jvlm.parallel.layout import MeshLayout
from jvlm.rl import meshes
from jvlm.rl.loop import banned_of, sampled_groups
from jvlm.rl.packing import packed_answers
from jvlm.rl.rollout_files import ROLLOUTS, StoredGroup, read_groups, read_image, read_summary
from jvlm.rl.run import engine_of, shape_of
from jvlm.rl.task import PolicyTask
from jvlm.rl.weighing import Weighed, weigh
from jvlm.training import train_step
from jvlm.training.compiled_step import step_arguments
from jvlm.training.config import Experiment
from jvlm.training.starting_model import start_model
from jvlm.training.trainer import Trainer
from jvlm.weights import run_dir
from jvlm.weights.run_dir import EXPERIMENT


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A value of the run beside that of the replay."""

    name: str
    stored: Any
    replayed: Any

    @property
    def equal(self) -> bool:
        """Whether both are the same to the last bit."""
        return self.stored == self.replayed

    def line(self) -> str:
        """Return the comparison as one line."""
        if self.equal:
            return f"{self.name}: equal ({self.stored})"
        return f"{self.name}: {self.stored} stored, {self.replayed} now"


def replay(run: Path, step: int) -> Iterator[Comparison]:
    """Yield what a step stored beside what it gives now.

    Shaped rewards and advantages follow from the stored rewards. With a checkpoint of the step before, or at step 1 the
    model that the run started from, its compiled step is run again on the stored answers: loss, gradient norm, and how
    far its log-probabilities are from the engine's.

    Raises:
      UserError: no such run or step, a damaged file.
    """
    experiment, task = read_experiment(run)
    folder = run / ROLLOUTS
    stored = list(read_groups(folder, [step]))
    summary = read_summary(folder, step)
    selected = [one for one in stored if one.group.selected]
    groups = [one.group for one in selected]
    if not groups:
        raise UserError(f"step {step} of {run} trained on no group")
    weighed = weigh(groups, task.advantage, task.policy_loss, task.rollout.max_tokens)
    answers = [answer for group in groups for answer in group.answers]
    yield _all("shaped rewards", [answer.shaped for answer in answers], weighed.shaped)
    stored_values = [answer.advantage for answer in answers]
    if task.updates == 1:  # else they are of all answers of the rollout, of which this step has a part
        yield _all("advantages", stored_values, weighed.advantages.tolist())
    weighed = weighed._replace(advantages=np.array(stored_values, np.float64))
    if step > 1 and step - 1 not in run_dir.steps(run):
        return
    layout = meshes.training_layout(experiment.parallel, task.rollout)
    model, processor = _model_before(run, experiment, layout, step)
    metrics = _step(experiment, task, layout, model, processor, selected, weighed, folder)
    for name, value in metrics.items():
        if name in summary:
            yield Comparison(name, summary[name], value if math.isfinite(value) else None)


def _all(name: str, stored: Sequence[Any], replayed: Sequence[Any]) -> Comparison:
    count = sum(one == other for one, other in zip(stored, replayed, strict=True))
    return Comparison(name, f"{len(stored)} of {len(stored)}", f"{count} of {len(stored)}")


def read_experiment(run: Path) -> tuple[Experiment, PolicyTask]:
    """Return the experiment of a run of policy optimisation. Raises UserError for another folder."""
    if not run_dir.is_run(run):
        raise UserError(f"{run} is no run: it has no {EXPERIMENT}")
    values = read_object(run / EXPERIMENT)
    described = dict(values.get("task") or {})
    kind = described.pop("type", None)
    if kind != f"{PolicyTask.__module__}.{PolicyTask.__qualname__}":
        raise UserError(f"{run} is no run of jvlm rl: its task is {kind}")
    task = config_tree.from_dict(PolicyTask, described, "task.")
    hints = typing.get_type_hints(Experiment, include_extras=False)
    fields = {
        name: config_tree.from_dict(hints[name], value, f"{name}.")
        for name, value in values.items()
        if name in hints and name not in ("task", "hooks")
    }
    return Experiment(**fields, task=task), task


def _model_before(run: Path, experiment: Experiment, layout: MeshLayout, step: int) -> tuple[VLM, Processor]:
    """Return the model that a step began with."""
    sharding = layout.parameter
    if step == 1:
        return start_model(experiment, sharding)
    return jvlm.load(run, precision=experiment.model.precision, step=step - 1, sharding=sharding)


def _step(
    experiment: Experiment,
    task: PolicyTask,
    layout: MeshLayout,
    model: VLM,
    processor: Processor,
    selected: Sequence[StoredGroup],
    weighed: Weighed,
    folder: Path,
) -> Mapping[str, float]:
    """Return the metrics of the compiled step on stored answers."""
    engine = engine_of(experiment, task, model, processor, meshes.engine_place(model.config, task.rollout))
    banned = banned_of(engine)
    engine.release()
    prompts = [_prompt(one, processor, folder) for one in selected]
    sampled = sampled_groups([one.group for one in selected], prompts, weighed)
    batches = packed_answers(sampled, shape_of(experiment, processor), banned)
    trainer = Trainer(model, **step_arguments(experiment, model), layout=layout)
    local = train_step.stack([task.batch_of(one) for one in batches])
    batch = make_global_batch(local, trainer.shard, trainer.shapes_of(len(batches)))
    _, metrics = trainer.compiled.step(trainer.state, batch)
    left_out = (train_step.SOURCES, "update_norm")  # the optimizer begins anew here
    return {name: float(value) for name, value in metrics.items() if name not in left_out}


def _prompt(one: StoredGroup, processor: Processor, folder: Path) -> Example:
    """Return the prompt of a group as arrays. Raises UserError if it is not the one that was asked."""
    images = [read_image(folder, name) for name in one.images]
    record = {"messages": [dict(message) for message in one.prompt.messages], "images": images}
    example = processor.encode(record, generation_prompt=True)
    if example.length != one.group.prompt_tokens:
        raise UserError(
            f"{one.group.origin}: its prompt had {one.group.prompt_tokens} tokens and has {example.length}: the "
            "processor of the run is another one now"
        )
    return example
