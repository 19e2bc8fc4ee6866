"""From training arguments to an experiment, by a look at the model's folder and a sample of the data."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import jax

from jvlm import config as config_tree
from jvlm.data import survey
from jvlm.data.mixture.examples import Examples
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.swift import batches, checkpoints, grpo, language_model, saved
from jvlm.swift.arguments import RlhfArguments, TrainingArguments
from jvlm.swift.experiment import Facts, data_config, experiment_of, processor_config
from jvlm.training import processors
from jvlm.training.config import Experiment
from jvlm.weights import run_dir

_SAMPLE = 512
_VERSION = re.compile(r"v(\d+)-\d{8}-\d{6}")


def resumed(arguments: TrainingArguments, given: frozenset[str]) -> tuple[TrainingArguments, frozenset[str]]:
    """Return the arguments of the run that --resume_from_checkpoint names, with those that were typed on top.

    Raises:
      UserError: the checkpoint is not of a run of jvlm, or not its last.
    """
    place = arguments.output.resume_from_checkpoint
    if place is None or arguments.output.resume_only_model:
        return arguments, given
    run, step = _run_of(Path(place))
    values = saved.read(Path(place))
    typed = {name: value for name, value in saved.flat(arguments).items() if name in given}
    last = run_dir.steps(run)[-1:]
    if last != [step]:
        at = f"the last state of {run} is that of step {last[0]}" if last else f"{run} has no state to go on from"
        raise UserError(
            f"--resume_from_checkpoint {place}: {at}; give {run}/checkpoint-{last[0] if last else 'STEP'}, or take the "
            "weights alone with --resume_only_model true"
        )
    before = saved.filled(type(arguments)(), values)
    return saved.filled(before, {name: config_tree.to_dict(value) for name, value in typed.items()}), frozenset(
        values["given"]
    ) | given


def _run_of(checkpoint: Path) -> tuple[Path, int]:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    run = checkpoint.parent
    if match is None or not run_dir.is_run(run):
        raise UserError(f"--resume_from_checkpoint {checkpoint} is not RUN/checkpoint-STEP of a run of jvlm sft")
    return run, int(match[1])


def run_folder(arguments: TrainingArguments, now: time.struct_time) -> tuple[str, str]:
    """Return (root, name) of the run's folder: OUTPUT_DIR/vN-DATE-TIME, N being one more than the highest there is."""
    output = arguments.output
    if output.resume_from_checkpoint is not None and not output.resume_only_model:
        run = Path(output.resume_from_checkpoint).parent
        return str(run.parent), run.name
    given = arguments.output.output_dir or f"output/{Path(arguments.model.model).name}"
    if not output.add_version:
        parent, _, name = given.rstrip("/").rpartition("/")
        return parent or ".", name
    folder = Path(given)
    matches = (_VERSION.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    number = 1 + max((int(match[1]) for match in matches if match), default=-1)
    return given, f"v{number}-{time.strftime('%Y%m%d-%H%M%S', now)}"


def prepare(arguments: TrainingArguments, given: frozenset[str] = frozenset()) -> Experiment:
    """Return the experiment of the arguments. Every process must call it: they take the same run folder.

    Raises:
      UserError: no model or data; data of which nothing can be used; arguments that exclude one another.
    """
    if arguments.model.model is None:
        raise UserError("--model is missing: give the folder of a model")
    if not arguments.data.dataset:
        raise UserError("--dataset is missing: give a JSONL file of conversations")
    if isinstance(arguments, RlhfArguments) and arguments.preference.rlhf_type == "grpo":
        return grpo.prepare(arguments, given, data_config(arguments), run_folder)
    processor, text = _source(arguments)
    found = processor.config
    config = processor_config(arguments.model, found)
    data = data_config(arguments)
    roots = (data.media_root,) if data.media_root else ()
    processor = Processor(processor.tokenizer, processor.model, config, media_roots=roots)
    examples = Examples.open(data)
    sample = survey.take(processor, data, seed=arguments.optimization.seed, count=_SAMPLE, examples=examples)
    sample.check()
    chosen = batches.choose(
        sample.sizes,
        data,
        processor,
        per_device=arguments.optimization.per_device_train_batch_size,
        accumulation=arguments.optimization.gradient_accumulation_steps,
        devices=jax.device_count(),
    )
    sample = dataclasses.replace(sample, config=chosen.data)
    epoch = sample.steps(1.0, chosen.data.batch_size * chosen.accumulation)
    root, name = hosts.broadcast_from_0(run_folder(arguments, time.localtime()))
    facts = Facts(processor.model, found, chosen, len(examples.distinct()), epoch, root, name, text)
    return experiment_of(arguments, facts, given)


def _source(arguments: TrainingArguments) -> language_model.Source:
    if isinstance(arguments, RlhfArguments):
        return language_model.source_of(arguments.model.model)
    return language_model.Source(processors.load(run_dir.local(arguments.model.model)), None)


def last_checkpoint(experiment: Experiment) -> Path | None:
    """Return the last checkpoint folder of a run that has ended."""
    run = Path(experiment.output_root, experiment.name)
    found = checkpoints.steps(run)
    return run / f"checkpoint-{found[-1]}" if found else None
