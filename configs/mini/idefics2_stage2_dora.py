"""As mini/idefics2_stage2, with new DoRA on the merged model of idefics2_stage1_dora, as in idefics2/stage2_lora."""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return stage 2 with the adapter of stage 1."""
    full, first = configs.load("mini/idefics2_stage2"), configs.load("mini/idefics2_stage1_dora")
    return dataclasses.replace(
        full,
        name="idefics2_mini_stage2_dora",
        init_from="runs/idefics2_mini_stage1_dora/hf",
        adapter=first.adapter,
        optimizer=first.optimizer,
    )
