"""As mini/idefics2_stage1, with LoRA on both towers, and the connector trained whole, as in idefics2/stage1_lora.

The adapter is merged into its base before stage 2 (`jvlm merge-lora`, in `make idefics2-mini`).
"""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment, ExportConfig


def get_config() -> Experiment:
    """Write the adapter as a PEFT folder too, for merging."""
    mini, full = configs.module("mixtures/mini"), configs.load("mini/idefics2_stage1")
    return dataclasses.replace(
        full,
        name="idefics2_mini_stage1_lora",
        adapter=mini.IDEFICS2_ADAPTER,
        optimizer=mini.optimizer(learning_rate=mini.ADAPTER_RATE),
        export=ExportConfig(),
    )
