"""SmolLM2-135M and a small ViT, stage 2 of MiMo-VL's recipe: projector and tower learn on captions and pages.

jvlm train backbones/compose_stage2
"""

import dataclasses

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment, OptimizerConfig, ValidationConfig


def get_config() -> Experiment:
    """Train the tower at a tenth of the projector's rate, as in mimo_vl/stage2."""
    mini, first = configs.module("mixtures/mini"), configs.load("backbones/compose_stage1")
    mixture = Mixture({kind: Source(mini.train(kind)) for kind in ("captions", "interleaved")})
    return dataclasses.replace(
        first,
        name="compose_stage2",
        model=None,
        encoder_from=None,
        decoder_from=None,
        tokenizer=None,
        processor=None,
        init_from="runs/compose_stage1",
        data=dataclasses.replace(first.data, mixture=mixture),
        optimizer=OptimizerConfig(encoder_lr=5e-5, connector_lr=5e-4, decoder_lr=0.0, warmup_ratio=0.1),
        validation=ValidationConfig(data=mini.held_out("captions", "interleaved"), interval_steps=100),
        evaluation=dataclasses.replace(mini.evaluation("qa", "counting", "ocr"), max_new_tokens=8, batch_size=16),
        steps=100,
    )
