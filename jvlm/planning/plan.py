"""Plans of an experiment's steps: what planning assumes of the data, and the step compiled for a topology."""

from __future__ import annotations

import dataclasses

from jvlm.errors import UserError
from jvlm.training.compiled_step import abstract_batches
from jvlm.training.config import Experiment

from .chips import Topology
from .measure import compile_step
from .report import Plan
from .roofline import SegmentLengths, roofline


def plannable(experiment: Experiment, config: str) -> Experiment:
    """Return the experiment without its stages. Raises UserError where it does not hold its model."""
    if experiment.model is None:
        raise UserError(f"{config} takes its model from {experiment.init_from}; planning needs `model` in the config")
    return dataclasses.replace(experiment, stages=())


def assumed_lengths(
    experiment: Experiment, conversation: int | None = None, image: int | None = None
) -> SegmentLengths:
    """Return the lengths that are given; in place of others, the longest conversation or largest image there may be."""
    data = experiment.data
    largest = abstract_batches(experiment).max_image_patches or data.max_patches
    return SegmentLengths(conversation or data.max_length or data.seq_len, image or largest)


def plan_training(experiment: Experiment, topology: Topology, lengths: SegmentLengths) -> Plan:
    """Compile the training step for a topology, and bound its speed."""
    compiled = compile_step(experiment, topology)
    return Plan(topology, compiled, roofline(experiment, compiled, topology, lengths) if compiled.fits else None)
