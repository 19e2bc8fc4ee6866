"""The model that a run starts from: a folder's weights, or random ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

from jvlm.adapters import attach, peft_load
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.quantization.model import quantized
from jvlm.training import processors
from jvlm.training.config import AdaptConfig, Experiment
from jvlm.weights import backbones, hf, positions, run_dir, upcycling
from jvlm.weights.io import load
from jvlm.weights.labels import with_labels


def start_model(experiment: Experiment, sharding: hf.ShardingOf | None = None) -> tuple[VLM, Processor]:
    """Return the model to start from and its processor.

    Args:
      sharding: of a parameter, from its path and variable; None puts all on the first device.
    """
    if experiment.init_from is not None:
        precision = experiment.model.precision if experiment.model else None
        adapt, quantize = experiment.adapt, experiment.quantize
        peft_load.refuse_as_start(run_dir.local(experiment.init_from, weights=False))
        at_once = quantize if adapt.grid is None and adapt.experts is None else None
        model, processor = load(
            experiment.init_from,
            precision=precision,
            sharding=sharding,
            grow_embedding=adapt.grow_embedding,
            quantize=at_once,
        )
        if experiment.adapt.grid is not None:
            model = positions.with_grid(model, experiment.adapt.grid, experiment.adapt.grid_scale)
        if experiment.adapt.experts is not None:
            model = upcycling.upcycle(model, experiment.adapt.experts, seed=experiment.seed, sharding=sharding)
        if quantize is not None and at_once is None:
            model = quantized(model, quantize, sharding)
        processor = processors.adapted(processor, experiment, model.config)
    else:
        processor = processors.new(experiment)
        model = random_model(experiment.model, experiment.seed, sharding)
        towers = [run_dir.local(path) for path in (experiment.encoder_from, experiment.decoder_from) if path]
        model = backbones.fill(model, towers, sharding)
        if experiment.quantize is not None:
            model = quantized(model, experiment.quantize, sharding)
    if experiment.adapt.labels is not None:
        model = with_labels(model, experiment.adapt.labels, seed=experiment.seed, sharding=sharding)
    model = _with_adapters(model, experiment, processor, sharding)
    if experiment.data.media_root:
        processor = processor.replace(media_roots=(experiment.data.media_root,))
    return model, processor


def _with_adapters(model: VLM, experiment: Experiment, processor: Processor, sharding: hf.ShardingOf | None) -> VLM:
    """Return the model with the adapters that the experiment asks for; those that it came with stay."""
    wanted = experiment.adapter
    if model.adapters is not None:
        if experiment.adapters_from is not None or wanted not in (None, model.adapters.config):
            raise UserError(
                f"init_from {experiment.init_from} has adapters ({model.adapters.config}), and adapter or "
                "adapters_from asks for others: leave these out to train those on, or merge the adapters first and "
                "start from that"
            )
        return model
    if experiment.adapters_from is not None:
        return attach.attach(model, peft_load.read_beside(model, experiment.adapters_from), sharding=sharding)
    if wanted is None:
        return model
    tokenizer = processor.tokenizer
    return attach.attach(model, wanted, seed=experiment.seed, tokenizer=tokenizer, sharding=sharding)


def base_of(experiment: Experiment) -> str | None:
    """Return the folder whose parameters `start_model` takes over unchanged; None where there is none."""
    return experiment.init_from if experiment.adapt == AdaptConfig() else None


def random_model(config: VLMConfig, seed: int, sharding: hf.ShardingOf | None) -> VLM:
    """Return a new model, each parameter made on its devices."""
    template = vlm.abstract(config)
    shardings = tuple((path, sharding(path, v)) for path, v in vlm.parameters(template).items()) if sharding else None
    return vlm.bind(template, _drawing(config, shardings)(seed))


@functools.lru_cache(maxsize=8)
def _drawing(
    config: VLMConfig, shardings: tuple[tuple[str, jax.sharding.Sharding], ...] | None
) -> Callable[[int], dict[str, jax.Array]]:
    """Return seed -> parameters by path; the runs of a process that start alike share one program."""

    def values(seed: int) -> dict[str, jax.Array]:
        return {path: v.get_value() for path, v in vlm.parameters(VLM(config, rngs=nnx.Rngs(seed))).items()}

    return jax.jit(values, static_argnums=0, out_shardings=None if shardings is None else dict(shardings))
