"""As mini/mm1_5_sft, after the MLPs of every second layer have become eight experts, two for each token."""

import dataclasses

from jvlm import configs
from jvlm.models.decoders.moe import MoEConfig
from jvlm.training.config import AdaptConfig, Experiment


def get_config() -> Experiment:
    """Experts are as wide as the dense layer that they begin as copies of (`jvlm.weights.upcycling`)."""
    mini, dense = configs.module("mixtures/mini"), configs.load("mini/mm1_5_sft")
    experts = MoEConfig(experts=8, intermediate_size=mini.DECODER.intermediate_size)
    decoder = dataclasses.replace(dense.model.decoder, mlp=experts)
    model = dataclasses.replace(dense.model, decoder=decoder)
    return dataclasses.replace(dense, name="mm1_5_mini_moe", model=model, adapt=AdaptConfig(experts=experts))
