"""Generation on chips that are not there: the pass over prompts, and the step that makes one token of each sequence."""

from __future__ import annotations

import dataclasses

from jvlm import families
from jvlm.data import packing
from jvlm.errors import UserError
from jvlm.inference import compiled, sharding
from jvlm.inference.compiled import AbstractSteps, BatchShape
from jvlm.inference.engine import LANES, PATCH_STEP, TOKEN_STEP
from jvlm.models import vlm
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import flops
from jvlm.training.config import Experiment

from .chips import Topology
from .measure import Compiled, bytes_of, devices_of, measure
from .report import Plan, StepKind
from .roofline import Roofline, SegmentLengths, assess

DTYPE = "bfloat16"  # of served parameters, unless the command line says otherwise


def served(experiment: Experiment) -> Experiment:
    """Return an experiment as it would be served: parameters in `DTYPE`, and a mesh for generation."""
    if experiment.model is None:
        return experiment
    precision = dataclasses.replace(experiment.model.precision, param_dtype=DTYPE, remat="none")
    model = dataclasses.replace(experiment.model, precision=precision)
    return dataclasses.replace(experiment, model=model, parallel=ParallelConfig(rules=sharding.RULES))


def rounded(config: VLMConfig, sequences: int, prompt: int, patches: int, cache_len: int) -> BatchShape:
    """Return bucket of shapes that the engine would compile for on a TPU. Raises UserError for a cache too short."""
    if cache_len < prompt:
        raise UserError(f"--cache_len {cache_len} does not hold a prompt of {prompt} tokens")
    images = families.get(config.family).image_config.build(config)
    step = packing.patch_step(images.patch_group, PATCH_STEP)
    return BatchShape(
        sequences,
        packing.bucket(prompt, TOKEN_STEP),
        packing.bucket(patches, step) if patches else 0,
        packing.bucket(cache_len, LANES),
    )


def plan(
    config: VLMConfig, asked: ParallelConfig | None, topology: Topology, sizes: BatchShape, step: StepKind, image: int
) -> Plan:
    """Compile a step of the engine, and bound its speed; images have ``image`` patches."""
    planned = prepare(config, asked, topology, sizes)
    if step == "decode":
        compiled = compile_decode(planned, topology)
        best = roofline_of_decode(planned, compiled, topology) if compiled.fits else None
        return Plan(topology, compiled, best, step)
    compiled, cache_growth = compile_prefill(planned, topology)
    best = roofline_of_prefill(planned, compiled, cache_growth, topology, image) if compiled.fits else None
    return Plan(topology, compiled, best, step, cache_growth)


def prepare(config: VLMConfig, asked: ParallelConfig | None, topology: Topology, sizes: BatchShape) -> AbstractSteps:
    """Return engine's program on a topology; on the mesh that the engine takes by itself, unless one is asked for."""
    devices = devices_of(topology)
    return compiled.abstract_steps(
        config, MeshLayout.of(asked or sharding.default_mesh(config, len(devices)), devices), sizes
    )


def compile_prefill(planned: AbstractSteps, topology: Topology) -> tuple[Compiled, Compiled]:
    """Return the pass over the prompts, and the step after it that makes room for the answers in their cache.

    Both caches exist together for a moment. Parameters stay.
    """
    parameters, batch, prompt_cache = (bytes_of(x) for x in (planned.leaves, planned.batch, planned.prompt_cache))
    sizes, mesh = {"parameters": parameters, "batch": batch}, planned.layout.mesh
    taken = planned.config.encoder.branch_frequency()
    first = measure(
        planned.lower_prefill, mesh, topology, branch_frequency=taken, new_results={"cache": prompt_cache}, **sizes
    )
    opened = {"cache": bytes_of(planned.decode_arguments()[0].cache)}
    idle = parameters + batch
    then = measure(
        planned.lower_first_token, mesh, topology, new_results=opened, resident=idle, cache=prompt_cache, **sizes
    )
    return first, then


def compile_decode(planned: AbstractSteps, topology: Topology) -> Compiled:
    """One step for all sequences. All parameters stay on the chips, the vision tower's too, which it never reads."""
    state, token = planned.decode_arguments()
    parameters = bytes_of(planned.leaves)
    return measure(
        lambda: planned.lower_decode(state, token),
        planned.layout.mesh,
        topology,
        resident=parameters - bytes_of(planned.decoder_leaves),
        parameters=parameters,
        cache=bytes_of(state.cache),
        batch=bytes_of((token, state.cache_index, state.position, planned.arrays)),
    )


def roofline_of_prefill(
    planned: AbstractSteps, compiled: Compiled, cache_growth: Compiled, topology: Topology, image: int
) -> Roofline:
    """Return the roofline of full prompts with images of ``image`` patches, the growth of their cache included."""
    template, sizes = vlm.abstract(planned.config), planned.sizes
    lengths = SegmentLengths(conversation=sizes.prompt_len, image=image)
    counts = lengths.counts(template, sizes.batch_size, sizes.prompt_len, sizes.max_patches)
    counts = dataclasses.replace(counts, targets=sizes.batch_size)  # the head sees the last token alone
    kernels = sum(work.attention for work in flops.forward(template, counts).values())
    if topology.switched:
        kernels += flops.experts(template, counts.tokens)
    both = dataclasses.replace(compiled, hbm=compiled.hbm + cache_growth.hbm)
    return assess(flops.inference(template, counts), kernels, counts.tokens, len(counts.images), both, topology)


def roofline_of_decode(planned: AbstractSteps, compiled: Compiled, topology: Topology) -> Roofline:
    """Return the roofline of a step with the whole cache filled."""
    template, sizes = vlm.abstract(planned.config), planned.sizes
    parts, kernels = flops.decoding(template, sizes.batch_size, sizes.cache_len)
    if topology.switched:
        kernels += flops.experts(template, sizes.batch_size)
    return assess(parts, kernels, sizes.batch_size, 0, compiled, topology)
