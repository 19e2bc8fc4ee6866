"""A run of policy optimisation: model, engine, rewards and trainer in one program, from its last checkpoint on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

import jvlm
from jvlm import config as config_tree
from jvlm.data import packing
from jvlm.data.encode import image_patch_limit
from jvlm.data.errors import ExampleError
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.engine import PATCH_STEP, Engine
from jvlm.inference.requests import EngineConfig
from jvlm.models.vlm import VLM
from jvlm.parallel import hosts
from jvlm.rl import meshes, shared_engine
from jvlm.rl.config import RewardConfig
from jvlm.rl.held_out import HeldOutRewards
from jvlm.rl.journal import Journal
from jvlm.rl.loop import PolicyLoop
from jvlm.rl.packing import Shape
from jvlm.rl.prompts import Limits, Prompts
from jvlm.rl.rewards import config as reward_config
from jvlm.rl.rewards.client import ClientConfig, RewardClient
from jvlm.rl.rewards.plugins import PluginReward
from jvlm.rl.rewards.router import Route, Router
from jvlm.rl.rewards.rules import RuleReward
from jvlm.rl.rollout_log import RolloutLog
from jvlm.rl.rollouts import Rollouts
from jvlm.rl.task import PolicyTask
from jvlm.training import hub_pins, push, resume
from jvlm.training.checkpointing import Checkpointing, StorageSync
from jvlm.training.compiled_step import step_arguments
from jvlm.training.config import Experiment
from jvlm.training.goodput import Goodput
from jvlm.training.interruption import StopRequests, stopped
from jvlm.training.log import TrainingLog, clock
from jvlm.training.nonfinite import NonFiniteMonitor
from jvlm.training.profile import Profile
from jvlm.training.resolve import describe
from jvlm.training.run_storage import RunStorage
from jvlm.training.runs import Result
from jvlm.training.side_files import write_lines
from jvlm.training.starting_model import base_of, start_model
from jvlm.training.task_scores import TaskScores
from jvlm.training.throughput import LearningRates
from jvlm.training.trainer import Trainer
from jvlm.weights import run_dir
from jvlm.weights.run_dir import CHECKPOINTS

REJECTED = "rejected_prompts.jsonl"
_MEASURED = 256  # prompts that sizes are derived from, where the experiment leaves them open


@contextmanager
def rewards_of(task: PolicyTask) -> Iterator[Router | RewardClient]:
    """Return what judges the answers of a task.

    Raises:
      UserError: a file that cannot be read, a service that is not there.
    """
    config = task.rewards
    if config.service is not None:
        key = None
        if config.service_key_variable is not None:
            key = os.environ.get(config.service_key_variable)
            if not key:
                raise UserError(
                    f"the environment variable {config.service_key_variable} (task.rewards.service_key_variable) is "
                    "not set"
                )
        with RewardClient(ClientConfig(config.service, key)) as client:
            client.describe()  # a service that is not there is told now
            yield client
        return
    with _router(config) as router:
        yield router


def _router(config: RewardConfig) -> Router:
    if config.judges_all is None:
        return reward_config.read(Path(config.file)) if config.file else reward_config.rules()
    source = PluginReward(config.plugin) if config.plugin else RuleReward(config.rule)
    return Router({}, Route(source, config.format_gate))


def _looks_at_images(rewards: Router | RewardClient) -> bool:
    if isinstance(rewards, RewardClient):
        return True
    return any(not isinstance(source, RuleReward) for source in rewards.sources)


def train(experiment: Experiment) -> Result:
    """Train a policy to its end, or from its last checkpoint on.

    Raises:
      UserError: an experiment whose task is no `PolicyTask`; prompts, rewards or a folder that cannot be used.
      Diverged: too many steps in a row were not finite.
      Interrupted: a signal or a preemption notice asked to stop; the last step is saved.
    """
    task = experiment.task
    if not isinstance(task, PolicyTask):
        raise UserError(
            f"the task of {experiment.name} is {type(task).__name__}: jvlm train trains it; jvlm rl is for PolicyTask"
        )
    if jax.process_count() > 1 and task.selection.ahead:
        raise UserError(
            f"task.selection.ahead keeps answers in the engine of one process, and there are {jax.process_count()}: "
            "leave it out"
        )
    if experiment.stages:
        raise UserError("stages are supervised: train them with jvlm train, and give the result as init_from")
    with rewards_of(task) as rewards:
        return _train(experiment, task, rewards)


def _train(experiment: Experiment, task: PolicyTask, rewards: Router | RewardClient) -> Result:
    push.check(experiment)
    experiment, pins = hub_pins.pin(experiment, [])
    layout = meshes.training_layout(experiment.parallel, task.rollout)
    model, processor = start_model(experiment, layout.parameter)
    # processes that meet for the first time must do so within seconds
    hosts.barrier("made the model")
    storage = RunStorage(experiment.output_root, experiment.name)
    storage.pull()
    prompts = Prompts(
        processor, experiment.data, rewards, task=task.rewards.task, with_images=_looks_at_images(rewards)
    )
    experiment = _resolved(experiment, task, model, processor, prompts, storage.folder)
    arguments = step_arguments(experiment, model)
    changes = resume.prepare_folder(storage.folder, experiment, processor)
    if hosts.is_rank0():
        write_lines(storage.folder / REJECTED, map(dataclasses.asdict, prompts.rejected))
    if model.adapters is not None and hosts.is_rank0():
        model.adapters.write(storage.folder)
    hub_pins.write(storage.folder, pins)
    storage.share()
    checkpointing = Checkpointing(storage, experiment.checkpoint, base_of(experiment))
    place = meshes.engine_place(model.config, task.rollout)
    engine = engine_of(experiment, task, model, processor, place)
    trainer = Trainer(model, **arguments, layout=layout, use_ema=experiment.optimizer.use_ema)
    del model
    engine.release()
    hosts.log_rank0(describe(experiment, trainer.template, layout))
    hosts.log_rank0(f"{len(prompts)} prompts of {len(prompts.examples)} examples, {len(prompts.rejected)} left out")
    loop = _loop(experiment, task, engine, place, prompts, rewards, storage.folder)
    monitor = NonFiniteMonitor(storage.folder, storage.store, experiment.stop_after_skips)
    log = TrainingLog(storage.folder, experiment.log_interval_steps, changes)
    tasks = ()
    if experiment.evaluation.tasks:
        tasks = (TaskScores(experiment.evaluation, processor, storage.folder),)
    perfect, decides = task.rewards.perfect, rewards.describe()
    written = RolloutLog(loop, storage.folder, task.log, prompts.images, perfect, decides)
    held_out = ()
    if experiment.validation.data:
        held_out = (_held_out(experiment, task, engine, place, processor, rewards),)
    pushes = ()
    if experiment.push.hub_model_id and experiment.push.every == "all":
        pushes = (push.PushCheckpoints(experiment, processor, storage.folder),)
    trainer.hooks = (
        checkpointing,
        StorageSync(storage),
        StopRequests(),
        *tasks,
        *held_out,
        log,
        written,
        monitor,
        loop,  # behind these, which it so comes before when a step ends: it measures the step
        LearningRates(experiment.optimizer, experiment.steps, lambda: monitor.skipped),
        Goodput(storage.folder),
        Profile(storage.folder, experiment.profile),
        *pushes,
        *experiment.hooks,
    )
    trainer.fit(loop, steps=experiment.steps)
    if trainer.step < experiment.steps and not trainer.finished:
        raise stopped(trainer, experiment.steps, storage.store / CHECKPOINTS)
    compilations = trainer.compiled.step.compilations
    hosts.log_rank0(f"{trainer.step} steps in {clock(log.seconds)}, {compilations} compilation(s)" + monitor.summary())
    storage.push()
    trainer.state = dataclasses.replace(trainer.state, trainable=trainer.evaluated_params())
    failed = tuple(line for hook in pushes for line in hook.failures)
    return Result(
        trainer.model,
        processor,
        storage,
        trainer.step,
        trainer.step,
        log.seconds,
        compilations,
        len(prompts.rejected),
        failed,
    )


def _held_out(
    experiment: Experiment,
    task: PolicyTask,
    engine: Engine,
    place: meshes.EnginePlace,
    processor: Processor,
    rewards: Router | RewardClient,
) -> HeldOutRewards:
    """Return the hook that answers the prompts of ``validation.data``."""
    data = dataclasses.replace(experiment.data, train=experiment.validation.data, mixture=None)
    prompts = Prompts(processor, data, rewards, task=task.rewards.task, with_images=_looks_at_images(rewards))
    limits = _limits(experiment, task, processor)
    count = min(task.log.held_out_prompts, len(prompts))
    chosen = [prompts.encode(n * len(prompts) // count, limits) for n in range(count)]
    interval = experiment.validation.interval_steps
    return HeldOutRewards(engine, place, chosen, rewards, interval, task.rollout.max_tokens)


def _limits(experiment: Experiment, task: PolicyTask, processor: Processor) -> Limits:
    """Return what a prompt may have."""
    data = experiment.data
    most = image_patch_limit(processor.image_processor, processor.image_config, data)
    return Limits(data.longest - task.rollout.max_tokens, data.max_patches, most)


def _resolved(
    experiment: Experiment, task: PolicyTask, model: VLM, processor: Processor, prompts: Prompts, folder: Path
) -> Experiment:
    """Return the experiment with what it left to be derived: from the run so far, else from prompts."""
    experiment = dataclasses.replace(experiment, model=model.config, processor=processor.config)
    if model.adapters is not None:
        experiment = dataclasses.replace(experiment, adapter=model.adapters.config)
    if run_dir.is_run(folder):
        experiment = resume.derived(experiment, folder)
    data = experiment.data
    if "auto" in (data.seq_len, data.max_patches):
        sample = list(_encoded(prompts, min(len(prompts), _MEASURED)))
        longest = max((one.length for one in sample), default=0) + task.rollout.max_tokens
        patches = max((one.num_patches for one in sample), default=0)
        step = packing.patch_step(processor.image_processor.patch_group, PATCH_STEP)
        seq_len = packing.bucket(longest, 64) if data.seq_len == "auto" else data.seq_len
        max_patches = data.max_patches
        if max_patches == "auto":
            max_patches = packing.bucket(patches, step) if patches else 0
        data = dataclasses.replace(data, seq_len=seq_len, max_patches=max_patches)
    if task.rollout.max_tokens >= data.longest:
        raise UserError(
            f"task.rollout.max_tokens = {task.rollout.max_tokens} leaves no room for a prompt in data.seq_len = "
            f"{data.longest}"
        )
    return dataclasses.replace(experiment, data=data)


def _encoded(prompts: Prompts, count: int) -> Iterator[Example]:
    """Return prompts spread over all of them; those that cannot be read are told when they are asked."""
    everything = Limits(1 << 30, 1 << 30, None)
    for number in range(0, len(prompts), max(len(prompts) // count, 1)):
        try:
            yield prompts.encode(number, everything).example
        except ExampleError:
            continue


def engine_of(
    experiment: Experiment, task: PolicyTask, model: VLM, processor: Processor, place: meshes.EnginePlace
) -> Engine:
    """Return the engine that draws a task's answers, in a place of this process.

    Raises:
      UserError: slots that hold no group on each of the devices that have sequences of their own.
    """
    rollout, longest = task.rollout, experiment.data.longest
    parts = 1 if place.layout is None else place.layout.num_shards(place.layout.mesh_axes("batch"))
    if rollout.slots < parts * rollout.answers:
        raise UserError(
            f"task.rollout.slots = {rollout.slots} are shared by {parts} parts of the devices, and each must hold a "
            f"group of task.rollout.answers = {rollout.answers}: give at least {parts * rollout.answers}"
        )
    images = processor.image_processor
    most = image_patch_limit(images, processor.image_config, experiment.data) or experiment.data.max_patches
    longest_prompt = longest - rollout.max_tokens
    prompt = rollout.prefill_tokens or longest_prompt
    sizes: dict[str, Any] = {}
    if most:
        # of the largest picture, and of one for each of the longest prompts that a prefill takes
        step = packing.patch_step(images.patch_group, PATCH_STEP)
        together = max(prompt // longest_prompt, 1)
        sizes["encode_patches"] = tuple(sorted({packing.bucket(count * most, step) for count in (1, together)}))
    config = EngineConfig(
        max_slots=rollout.slots,
        max_model_len=longest,
        page_size=rollout.page_size,
        num_pages=rollout.pages,
        prefill_tokens=(packing.bucket(prompt, 64),),
        decode_slots=(rollout.slots,),
        prefix_cache=False,  # a prompt is asked once with the same weights
        logprobs="sampled",
        **sizes,
    )
    return Engine(place.model(model), processor, config, place.layout)


def shape_of(experiment: Experiment, processor: Processor) -> Shape:
    """Return the shape of a micro-batch."""
    data, images = experiment.data, processor.image_processor
    return Shape(
        data.batch_size,
        data.seq_len,
        data.max_patches,
        data.max_length,
        image_patch_limit(images, processor.image_config, data),
        images.patch_values,
        processor.model.encoder.position_values,
    )


def _loop(
    experiment: Experiment,
    task: PolicyTask,
    engine: Engine,
    place: meshes.EnginePlace,
    prompts: Prompts,
    rewards: Router | RewardClient,
    folder: Path,
) -> PolicyLoop:
    data, processor = experiment.data, prompts.processor
    limits = _limits(experiment, task, processor)
    shape = shape_of(experiment, processor)
    settings = {
        "jvlm": jvlm.__version__,
        "seed": experiment.seed,
        "rollout": config_tree.to_dict(task.rollout),
        "rewards": rewards.describe(),
        "seq_len": data.seq_len,
    }
    slots = task.rollout.slots
    engines = shared_engine.join(engine, slots)
    rollouts = Rollouts(
        engines if isinstance(engines, shared_engine.SharedEngine) else engine,
        lambda number: prompts.encode(number, limits),
        rewards,
        Journal(folder),
        task.rollout,
        task.rewards,
        seed=experiment.seed,
        slots=slots * jax.process_count(),
    )
    keep = experiment.checkpoint.max_to_keep * experiment.checkpoint.save_interval_steps
    return PolicyLoop(
        task,
        engine,
        place,
        rollouts,
        len(prompts),
        shape,
        seed=experiment.seed,
        settings=settings,
        keep=keep,
        engines=engines,
    )
