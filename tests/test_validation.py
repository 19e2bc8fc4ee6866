"""Every number of a configuration is refused by name where it makes no sense, when it is given."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from jvlm.data.config import DataConfig
from jvlm.errors import UserError
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import (
    AdaptConfig,
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    ExportConfig,
    OptimizerConfig,
    Stage,
)

# how to make one, and what its fields are called in messages
CONFIGS = {
    DataConfig: ({}, "data."),
    OptimizerConfig: ({}, "optimizer."),
    CheckpointConfig: ({}, "checkpoint."),
    EvaluationConfig: ({"before_training": True}, "evaluation."),
    ExportConfig: ({}, "export."),
    AdaptConfig: ({}, "adapt."),
    ParallelConfig: ({}, "parallel."),
    Stage: ({"name": "first", "data": DataConfig()}, "stage first: "),
    Experiment: ({"name": "run", "init_from": "folder"}, ""),
    QwenImageConfig: ({}, "processor.image."),
    Idefics2ImageConfig: ({}, "processor.image."),
    TiledImageConfig: ({}, "processor.image."),
}


def _numbers(kind):
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float} and not any(typing.get_origin(k) is tuple for k in kinds):
            yield field.name


NUMBERS = [(kind, name) for kind in CONFIGS for name in _numbers(kind)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -2, True, "7", [3]])
@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_no_number_of_any_configuration_takes_what_is_no_number(kind, name, value):
    fixed, prefix = CONFIGS[kind]
    with pytest.raises(UserError, match=f"{prefix}{name} must be .*, got"):
        kind(**{**fixed, name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CheckpointConfig, "max_to_keep", 0),
        (CheckpointConfig, "save_interval_steps", 0),
        (CheckpointConfig, "keep_period", 0),
        (Experiment, "steps", 0),
        (Experiment, "epochs", -1),
        (Experiment, "epochs", 0),
        (Experiment, "gradient_accumulation_steps", 0),
        (Experiment, "seed", 2**32),
        (Experiment, "steps", 2.5),
        (OptimizerConfig, "learning_rate", -1e-5),
        (OptimizerConfig, "decoder_lr", -1e-5),
        (OptimizerConfig, "warmup_ratio", 1.5),
        (OptimizerConfig, "beta1", 1.0),
        (OptimizerConfig, "beta2", 1.0),
        (OptimizerConfig, "eps", 0.0),
        (OptimizerConfig, "max_grad_norm", 0.0),
        (DataConfig, "batch_size", 0),
        (DataConfig, "seq_len", 0),
        (DataConfig, "seq_len", "all"),
        (DataConfig, "max_patches", -1),
        (DataConfig, "max_length", 0),
        (DataConfig, "max_image_patches", 0),
        (DataConfig, "max_bad_fraction", 1.5),
        (DataConfig, "max_too_long_fraction", -0.1),
        (DataConfig, "single_turn_ratio", 1.1),
        (DataConfig, "on_too_long", "cut"),
        (EvaluationConfig, "max_examples", 0),
        (EvaluationConfig, "ask", "together"),
        (Stage, "steps", 0),
        (AdaptConfig, "grid", 0),
        (QwenImageConfig, "max_pixels", 0),
        (QwenImageConfig, "fps", 0.0),
        (Idefics2ImageConfig, "shortest_edge", 0),
        (TiledImageConfig, "num_frames", 0),
        (TiledImageConfig, "static_grid", (0, 2)),
        (TiledImageConfig, "max_upscale", 0.0),
        (ParallelConfig, "tensor", 0),
        (ParallelConfig, "data_slices", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(kind, name, value):
    fixed, prefix = CONFIGS[kind]
    with pytest.raises(UserError, match=rf"{prefix}{name} must be .*, got {value!r}|{prefix}{name} must be .*{value}"):
        kind(**{**fixed, name: value})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (OptimizerConfig, {"warmup_ratio": 1.0, "min_lr_ratio": 1.0, "weight_decay": 0, "beta1": 0.0}),
        (OptimizerConfig, {"learning_rate": 0.0, "connector_lr": 1e-3}),
        (DataConfig, {"max_patches": 0, "seq_len": "auto", "max_too_long_fraction": 1}),
        (ParallelConfig, {"data": 1, "fsdp": -1}),
        (ExportConfig, {"verify": 0}),
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(kind, changes):
    config = kind(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_all_towers_frozen_is_said_with_their_rates():
    with pytest.raises(UserError, match=r"every tower is frozen(.|\n)*optimizer.learning_rate is 0.0"):
        OptimizerConfig(learning_rate=0.0)
    with pytest.raises(UserError, match="nothing would be trained"):
        OptimizerConfig(encoder_lr=0.0, connector_lr=0.0, decoder_lr=0.0)


def test_one_file_in_place_of_a_list_is_refused():
    with pytest.raises(UserError, match=r"data.train is a list, got the text 'examples.jsonl'"):
        DataConfig(train="examples.jsonl")
