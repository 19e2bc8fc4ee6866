"""As mini/idefics2_sft, with LoRA on both towers, and the connector trained whole, as in idefics2/sft_dora."""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return mini/idefics2_sft with the adapter of mini/idefics2_stage1_lora."""
    full, first = configs.load("mini/idefics2_sft"), configs.load("mini/idefics2_stage1_lora")
    return dataclasses.replace(full, name="idefics2_mini_sft_lora", adapter=first.adapter, optimizer=first.optimizer)
