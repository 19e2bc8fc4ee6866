"""SmolLM2-135M and a small ViT, fine-tuned: LoRA on the language model, the projector whole, on questions.

jvlm train backbones/compose_lora
"""

import dataclasses

from jvlm import configs
from jvlm.adapters.config import AdapterConfig
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment, OptimizerConfig


def get_config() -> Experiment:
    """Ask what easy-VQA asks, for numbers, and for words to be read."""
    mini, second = configs.module("mixtures/mini"), configs.load("backbones/compose_stage2")
    kinds = ("qa", "counting", "ocr")
    return dataclasses.replace(
        second,
        name="compose_lora",
        init_from="runs/compose_stage2",
        adapter=AdapterConfig(
            rank=16, alpha=32.0, targets=("decoder.attention", "decoder.mlp"), train_modules=("connector",)
        ),
        data=dataclasses.replace(second.data, mixture=Mixture({kind: Source(mini.train(kind)) for kind in kinds})),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_ratio=0.1),
        validation=mini.validation(*kinds),
        steps=200,
    )
