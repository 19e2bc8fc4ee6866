"""Idefics2's first stage with the paper's other architecture: text reads images through gated cross-attention.

    jvlm train idefics2/pretrain_cross_attention --tokenizer DIR --data.train examples.jsonl

As idefics2/pretrain, but for the decoder: an image is one token of the text, and a layer before every fourth one reads
its 64 vision tokens: the comparison of arXiv 2405.02246, section 3.2.
"""

import dataclasses

from jvlm import configs
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return the experiment of idefics2/pretrain with cross-attention before every fourth layer."""
    experiment = configs.load("idefics2/pretrain")
    decoder = CrossAttentionTransformerConfig.of(experiment.model.decoder, cross_attention_every=4)
    model = dataclasses.replace(experiment.model, decoder=decoder)
    return dataclasses.replace(experiment, name="idefics2_pretrain_cross_attention", model=model, topologies=())
