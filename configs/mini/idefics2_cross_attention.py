"""As mini/idefics2_from_start, but text reads pictures through gated cross-attention, at equal parameters."""

import dataclasses

from jvlm import configs
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.training.config import Experiment

NARROWER = 256  # width of the MLPs, with which the decoder has the parameters of the other form with 384, but for 258


def get_config() -> Experiment:
    """One such layer before every third layer: the first, as there are three."""
    other = configs.load("mini/idefics2_from_start")
    decoder = dataclasses.replace(other.model.decoder, intermediate_size=NARROWER)
    decoder = CrossAttentionTransformerConfig.of(decoder, cross_attention_every=3)
    model = dataclasses.replace(other.model, decoder=decoder)
    return dataclasses.replace(other, name="idefics2_mini_cross_attention", model=model)
