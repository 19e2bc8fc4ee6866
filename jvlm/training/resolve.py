"""What an experiment leaves to be derived: from the run so far, else from a sample of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvlm.data import pipeline, survey
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.mixture.examples import Examples
from jvlm.data.prepare.held_out import HeldOut, HeldOutFiles
from jvlm.data.processor import Processor
from jvlm.evaluation import usable
from jvlm.models import vlm
from jvlm.models.vlm import TOWERS, VLM
from jvlm.parallel import hosts
from jvlm.parallel.layout import MeshLayout
from jvlm.training import resume, trainable
from jvlm.training.config import Experiment
from jvlm.weights import run_dir

# Examples read before a run. Where its length or its shapes are taken from them, all of them are, however long that
# takes, so that the same data gives the same run.
_SAMPLE, _SECONDS = 512, 20.0


def resolve(
    experiment: Experiment,
    model: VLM,
    processor: Processor,
    folder: Path | None = None,
    parts: int = 1,
    examples: Examples | None = None,
) -> Experiment:
    """Return the experiment with everything filled in that was left to be derived.

    Args:
      folder: of the run; None for one that is not saved.
      parts: devices that share a packed sequence.
      examples: the training data, if only some of the files' examples are.

    Raises:
      UserError: data of which too little can be used.
    """
    experiment = dataclasses.replace(experiment, model=model.config, processor=processor.config)
    if model.adapters is not None:
        experiment = dataclasses.replace(experiment, adapter=model.adapters.config)

    def derive() -> dict[str, Any]:
        begun = folder is not None and run_dir.is_run(folder)
        known = resume.derived(experiment, folder) if begun else experiment
        sample = _survey(known, processor, parts, examples)
        data = known.data if begun else sample.config  # a run keeps what it began with, whatever a sample shows now
        sequences = data.batch_size * known.gradient_accumulation_steps
        steps = known.steps or sample.steps(known.epochs, sequences)
        if data.run_examples is None and data.mixture is not None:
            data = dataclasses.replace(data, run_examples=sample.draws(steps * sequences))
        names = ("seq_len", "max_patches", "max_image_patches", "sources", "measured", "run_examples")
        return {"data": {name: getattr(data, name) for name in names}, "steps": steps}

    # all processes read a sample, so that none waits for another; what the first one derives holds for all
    chosen = hosts.broadcast_from_0(hosts.run_on_all(derive))
    data = dataclasses.replace(experiment.data, **chosen["data"])
    return dataclasses.replace(experiment, data=data, steps=chosen["steps"])


def check_ahead(job: Experiment, later: Sequence[Experiment], processor: Processor, parts: int) -> None:
    """Raise now what the data of later stages, of validation and of the evaluation would raise after hours."""
    others = [run.data for run in later]
    for data in others:
        sample = survey.take(
            _reading(processor, data), data, seed=job.seed, count=_SAMPLE // 2, seconds=_SECONDS, parts=parts
        )
        sample.check()
    config = job.evaluation
    if config.data:
        usable.check(
            config.data, _reading(processor, job.data), options=config.options(), max_examples=config.max_examples
        )


def held_out(experiment: Experiment, *, sample: bool = False) -> HeldOut | None:
    """Return what the training data should not hold: the files of ``evaluation.data`` and of ``validation.data``.

    Args:
      sample: as of `HeldOut`.
    """
    evaluation, validation, data = experiment.evaluation, experiment.validation, experiment.data
    sets = {
        "evaluation.data": HeldOutFiles(evaluation.data, evaluation.options()),
        "validation.data": HeldOutFiles(validation.data, FormatOptions.of(data)),
    }
    sets = {name: given for name, given in sets.items() if given.files}
    return HeldOut(sets, data.media_root, sample=sample) if sets else None


def _reading(processor: Processor, data: pipeline.DataConfig) -> Processor:
    """Return the processor, looking for images where this data has them."""
    return processor.replace(media_roots=(data.media_root,) if data.media_root else ())


def _survey(experiment: Experiment, processor: Processor, parts: int, examples: Examples | None) -> survey.Survey:
    """Read a sample of the data before the first step, and print what it is like."""
    data = experiment.data
    derives = experiment.steps is None or "auto" in (data.seq_len, data.max_patches)
    limit = {"count": _SAMPLE if derives else _SAMPLE // 2, "seconds": None if derives else _SECONDS}
    examples = Examples.open(data) if examples is None else examples
    sample = survey.take(
        processor,
        data,
        seed=experiment.seed,
        parts=parts,
        examples=examples,
        held_out=held_out(experiment, sample=True),
        **limit,
    )
    hosts.log_rank0("\n".join([*examples.formats(), sample.text()]))
    sample.check()
    return sample


def describe(experiment: Experiment, template: VLM, layout: MeshLayout) -> str:
    """Return the start-up table: tower, parameters, trainable, learning rate; and the shape of a step."""
    counts = vlm.parameter_counts(template)
    chosen = trainable.select(trainable.from_config(experiment.optimizer, template.adapters), vlm.variables(template))
    lines = [f"{'tower':<12}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
    trained = {path: (*experiment.optimizer.group_of(path), v.get_value().size) for path, v in chosen.items()}
    for tower in TOWERS:
        own = [parameter for path, parameter in trained.items() if path.startswith(f"{tower}.")]
        rates = sorted({rate for _, rate, _ in own}, reverse=True)
        rate = ", ".join(f"{rate:g}" for rate in rates) or "frozen"
        lines.append(f"{tower:<12}{counts[tower]:>16,}{sum(size for _, _, size in own):>16,}{rate:>16}")
    for name, rate in experiment.optimizer.groups(chosen).items():
        if name not in TOWERS:
            size = sum(size for group, _, size in trained.values() if group == name)
            lines.append(f"{name:<28}{size:>16,}{rate:>16g}")
    data = experiment.data
    kind = layout.mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1)
    devices = f"{layout.mesh.size} x {kind}" + (f" ({axes})" if axes else "")
    precision = experiment.model.precision
    lines.append(
        f"{experiment.steps} steps of {experiment.gradient_accumulation_steps} x {data.batch_size} sequences of "
        f"{data.seq_len} tokens and {data.max_patches} patches, on {devices}, {precision.param_dtype} parameters, "
        f"{precision.compute_dtype} compute"
    )
    return "\n".join(lines)
