"""As mini/idefics2_stage1, with DoRA on both towers, and the connector trained whole, as in idefics2/stage1_lora.

Stage 2 starts from the exported model, in which the adapter is merged into its base.
"""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment, ExportConfig


def get_config() -> Experiment:
    """Export the model, which merges the adapter."""
    mini, full = configs.module("mixtures/mini"), configs.load("mini/idefics2_stage1")
    return dataclasses.replace(
        full,
        name="idefics2_mini_stage1_dora",
        adapter=dataclasses.replace(mini.IDEFICS2_ADAPTER, use_dora=True),
        optimizer=mini.optimizer(learning_rate=mini.ADAPTER_RATE),
        export=ExportConfig(),
    )
