"""Plans of an experiment's steps: what planning assumes of the data, and the step compiled for a topology."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from jvlm.adapters.layers import is_adapter_path
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.packed_batch import PackedBatch
from jvlm.quantization.model import size_report
from jvlm.training import compiled_step, trainable
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
    # a task's batch may hold the packed one beside fields of its own
    inside = jax.tree.leaves(abstract_batches(experiment), is_leaf=lambda node: isinstance(node, PackedBatch))
    packed = next(node for node in inside if isinstance(node, PackedBatch))
    largest = packed.max_image_patches or data.max_patches
    return SegmentLengths(conversation or data.max_length or data.seq_len, image or largest)


def trained_and_frozen(experiment: Experiment) -> str:
    """Return what the training step trains and what it only reads, as Markdown; empty where it trains everything."""
    template = compiled_step.template_of(experiment)
    variables = vlm.variables(template)
    chosen = trainable.select(trainable.from_config(experiment.optimizer, template.adapters), variables)
    adapters = sum(_size(variable) for path, variable in chosen.items() if is_adapter_path(path))
    whole = sum(_size(variable) for path, variable in chosen.items() if not is_adapter_path(path))
    base = sum(vlm.parameter_counts(template).values())
    if whole == base:
        return ""
    lines = [f"- base: {base:,} parameters, {f'{base - whole:,} of them' if whole else 'all'} frozen"]
    if experiment.quantize is not None:
        lines += [f"- {line}" for line in size_report(template).splitlines()]
    if template.adapters is not None:
        config, groups = template.adapters.config, template.adapters.groups
        ranks = sorted({rank for group in groups for rank in group.ranks if rank})
        kind = ("rs" if config.use_rslora else "") + ("DoRA" if config.use_dora else "LoRA")
        count = sum(1 for group in groups for rank in group.ranks if rank)
        lines.append(
            f"- adapters: {kind} of rank {', '.join(map(str, ranks))} on {count} matrices, {adapters:,} parameters"
        )
    lines.append(
        "- a frozen matrix costs 4 FLOP a parameter and token where a gradient passes through it (forward, and "
        "backward for activations), 2 where none does, a trained one 6"
    )
    return "\n".join([*lines, ""])


def _size(variable: nnx.Variable) -> int:
    return math.prod(variable.get_value().shape)


def plan_training(experiment: Experiment, topology: Topology, lengths: SegmentLengths) -> Plan:
    """Compile the training step for a topology, and bound its speed."""
    compiled = compile_step(experiment, topology)
    return Plan(topology, compiled, roofline(experiment, compiled, topology, lengths) if compiled.readable else None)
