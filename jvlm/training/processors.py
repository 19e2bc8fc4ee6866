"""Processors without the weights of their models: of a folder, and of an experiment that has not begun."""

from __future__ import annotations

import os

from jvlm import families
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.data.tokenizers import load_tokenizer
from jvlm.models.vlm import VLMConfig
from jvlm.training.config import AdaptConfig, Experiment
from jvlm.weights import hf, positions, run_dir
from jvlm.weights.io import read_config


def load(source: str | os.PathLike, *, grow_embedding: bool = False) -> Processor:
    """Return the processor of a Hugging Face folder or a run folder. Arguments and errors are those of `jvlm.load`."""
    folder = run_dir.local(source, weights=False)
    config = read_config(folder)
    files = folder / run_dir.PROCESSOR if run_dir.is_run(folder) else folder
    return hf.load_processor(files, config, grow_embedding=grow_embedding)


def of_experiment(experiment: Experiment) -> Processor:
    """Return the processor that a run of the experiment would train with."""
    if experiment.init_from is None:
        return new(experiment)
    processor = load(experiment.init_from, grow_embedding=experiment.adapt.grow_embedding)
    config = processor.model
    if experiment.adapt.grid is not None:
        config = positions.config_with_grid(config, experiment.adapt.grid)
    return adapted(processor, experiment, config)


def new(experiment: Experiment) -> Processor:
    """Return the processor of a model that begins at random, from the experiment's tokenizer."""
    tokenizer = load_tokenizer(run_dir.local(experiment.tokenizer, weights=False))
    families.get(experiment.model.family).prepare_tokenizer(tokenizer)
    return Processor(tokenizer, experiment.model, experiment.processor or ProcessorConfig())


def adapted(processor: Processor, experiment: Experiment, config: VLMConfig) -> Processor:
    """Return the processor of ``init_from`` with what the experiment changes about it or its model, now ``config``."""
    if experiment.processor is None and experiment.adapt == AdaptConfig():
        return processor
    settings = experiment.processor or processor.config
    return Processor(processor.tokenizer, config, settings, generation=processor.generation)
