"""As mini/idefics2_stage2, with new LoRA on the merged model of idefics2_stage1_lora, as in idefics2/stage2_lora."""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return stage 2 with the adapter of stage 1."""
    full, first = configs.load("mini/idefics2_stage2"), configs.load("mini/idefics2_stage1_lora")
    return dataclasses.replace(
        full,
        name="idefics2_mini_stage2_lora",
        init_from="runs/idefics2_mini_stage1_lora/hf",
        adapter=first.adapter,
        optimizer=first.optimizer,
    )
