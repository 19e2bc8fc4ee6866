"""Idefics2 in miniature without pre-training: instruction tuning from random weights, to compare architectures.

The fully autoregressive form; mini/idefics2_cross_attention is the other one, with as many parameters.
"""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return the data of mini/idefics2_sft, for a new model."""
    mini, sft = configs.module("mixtures/mini"), configs.load("mini/idefics2_sft")
    return dataclasses.replace(
        sft,
        name="idefics2_mini_from_start",
        init_from=None,
        model=mini.IDEFICS2_MODEL,
        tokenizer=mini.IDEFICS2_TOKENIZER,
        steps=300,
    )
