"""SmolLM2-135M and a small ViT become one model, stage 1 of MiMo-VL's recipe: the projector alone learns on captions.

    make compose
    jvlm train backbones/compose_stage1

Parts and connector are those of backbones/smollm2_dinov2; the captions are of the papers in miniature, made larger.
"""

import dataclasses

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment, ValidationConfig

GRID = 16


def get_config() -> Experiment:
    """Fill a sequence with four pictures of 64 tokens and their captions."""
    mini, parts = configs.module("mixtures/mini"), configs.load("backbones/smollm2_dinov2")
    mixture = Mixture({"captions": Source(mini.train("captions"))})
    return dataclasses.replace(
        parts,
        name="compose_stage1",
        data=dataclasses.replace(parts.data, mixture=mixture, seq_len=352),
        validation=ValidationConfig(data=mini.held_out("captions"), interval_steps=100),
        steps=100,
        log_interval_steps=5,
    )
