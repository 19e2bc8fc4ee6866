"""As mini/idefics2_sft, with LoRA on both towers, and the connector trained whole, as in idefics2/stage1_lora."""

import dataclasses

from jvlm import configs
from jvlm.adapters.config import AdapterConfig
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Rank 16 at a width of 128 is a larger share of it than the paper's 64 of 4,096."""
    mini, full = configs.module("mixtures/mini"), configs.load("mini/idefics2_sft")
    adapter = AdapterConfig(
        rank=16,
        alpha=16.0,
        init="gaussian",
        targets=("encoder.attention", "encoder.mlp", "decoder.attention", "decoder.mlp"),
        train_modules=("connector",),
    )
    return dataclasses.replace(
        full,
        name="idefics2_mini_sft_lora",
        adapter=adapter,
        optimizer=mini.optimizer(learning_rate=4e-3),
    )
