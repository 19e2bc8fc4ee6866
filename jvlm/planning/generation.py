"""Generation on chips that are not there: the pass over prompts, and the step that makes one token of each sequence."""

from __future__ import annotations

import dataclasses

from jvlm import families
from jvlm.adapters import several
from jvlm.adapters.several import AdapterRoom
from jvlm.data import packing
from jvlm.errors import UserError
from jvlm.inference import abstract, sharding
from jvlm.inference.abstract import PAGE_SIZE, AbstractPrograms, BatchShape
from jvlm.inference.engine import PATCH_STEP
from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.model import quantized_template
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
    """Return the sizes that the engine would compile for, in whole pages. Raises UserError for a cache too short."""
    if cache_len < prompt:
        raise UserError(f"--cache_len {cache_len} does not hold a prompt of {prompt} tokens")
    images = families.get(config.family).image_config.build(config)
    step = packing.patch_step(images.patch_group, PATCH_STEP)
    return BatchShape(
        sequences,
        packing.bucket(prompt, PAGE_SIZE),
        packing.bucket(patches, step) if patches else 0,
        packing.bucket(cache_len, PAGE_SIZE),
    )


def plan(
    config: VLMConfig,
    asked: ParallelConfig | None,
    topology: Topology,
    sizes: BatchShape,
    step: StepKind,
    image: int,
    template: VLM | None = None,
) -> Plan:
    """Compile a step of the engine, and bound its speed; images have ``image`` patches.

    Args:
      template: the shapes of a model that is quantised or has adapters (`template_of`); None is a plain one.
    """
    planned = prepare(config, asked, topology, sizes, template)
    if step == "decode":
        compiled = compile_decode(planned, topology)
        best = roofline_of_decode(planned, compiled, topology) if compiled.readable else None
        return Plan(topology, compiled, best, step)
    compiled, encode = compile_prefill(planned, topology)
    readable = compiled.readable and (encode is None or encode.readable)
    best = roofline_of_prefill(planned, compiled, encode, topology, image) if readable else None
    return Plan(topology, compiled, best, step, encode)


def template_of(config: VLMConfig, quantize: QuantizationConfig | None, places: int, room: AdapterRoom) -> VLM:
    """Return the shapes of a model as `jvlm serve` holds it: quantised, and with room for so many adapters."""
    template = vlm.abstract(config)
    if quantize is not None:
        template = quantized_template(template, quantize)
    return several.structure(template, places, room) if places else template


def prepare(
    config: VLMConfig,
    asked: ParallelConfig | None,
    topology: Topology,
    sizes: BatchShape,
    template: VLM | None = None,
) -> AbstractPrograms:
    """Return the engine's programs on a topology; on the mesh that the engine takes itself, unless one is asked for."""
    devices = devices_of(topology)
    layout = MeshLayout.of(asked or sharding.default_mesh(config, len(devices)), devices)
    return abstract.abstract_programs(vlm.abstract(config) if template is None else template, layout, sizes)


def compile_prefill(planned: AbstractPrograms, topology: Topology) -> tuple[Compiled, Compiled | None]:
    """Compile the pass over the prompts, and the vision tower's over their pictures before it; None without pictures.

    Parameters, cache and features stay.
    """
    parameters, own = bytes_of(planned.leaves), bytes_of(planned.decoder_leaves)
    adapters = bytes_of(planned.adapter_leaves)
    cache, features = bytes_of(planned.cache), bytes_of(planned.features)
    prefill = measure(
        planned.lower_prefill,
        planned.layout.mesh,
        topology,
        resident=parameters - own,
        parameters=parameters - adapters,
        adapters=adapters,
        cache=cache,
        batch=features + bytes_of(planned.chunks),
    )
    if planned.pictures is None:
        return prefill, None
    encode = measure(
        planned.lower_encode,
        planned.layout.mesh,
        topology,
        branch_frequency=planned.config.encoder.branch_frequency(),
        resident=own + cache,
        parameters=parameters - adapters,
        adapters=adapters,
        cache=cache,
        batch=features + bytes_of(planned.pictures),
    )
    return prefill, encode


def compile_decode(planned: AbstractPrograms, topology: Topology) -> Compiled:
    """One step for all sequences. All parameters stay on the chips, the vision tower's too, which it never reads."""
    parameters, adapters = bytes_of(planned.leaves), bytes_of(planned.adapter_leaves)
    return measure(
        planned.lower_decode,
        planned.layout.mesh,
        topology,
        resident=parameters - bytes_of(planned.decoder_leaves),
        parameters=parameters - adapters,
        adapters=adapters,
        cache=bytes_of(planned.cache),
        batch=bytes_of((planned.tokens, planned.rows)),
    )


def roofline_of_prefill(
    planned: AbstractPrograms, compiled: Compiled, encode: Compiled | None, topology: Topology, image: int
) -> Roofline:
    """Return the roofline of full prompts with images of ``image`` patches, encoded and prefilled."""
    template, sizes = vlm.abstract(planned.config), planned.sizes
    lengths = SegmentLengths(conversation=sizes.prompt_len, image=image)
    counts = lengths.counts(template, sizes.batch_size, sizes.prompt_len, sizes.max_patches)
    counts = dataclasses.replace(counts, targets=sizes.batch_size)  # the head sees the last token alone
    kernels = sum(work.attention for work in flops.forward(template, counts).values())
    if topology.switched:
        kernels += flops.experts(template, counts.tokens)
    both = compiled
    if encode is not None:
        both = dataclasses.replace(
            compiled,
            flops=compiled.flops + encode.flops,
            hbm=compiled.hbm + encode.hbm,
            axis_traffic=(*compiled.axis_traffic, *encode.axis_traffic),
        )
    return assess(flops.inference(template, counts), kernels, counts.tokens, len(counts.images), both, topology)


def roofline_of_decode(planned: AbstractPrograms, compiled: Compiled, topology: Topology) -> Roofline:
    """Return the roofline of a step with the whole cache filled."""
    template, sizes = vlm.abstract(planned.config), planned.sizes
    parts, kernels = flops.decoding(template, sizes.batch_size, sizes.cache_len)
    if topology.switched:
        kernels += flops.experts(template, sizes.batch_size)
    return assess(parts, kernels, sizes.batch_size, 0, compiled, topology)
