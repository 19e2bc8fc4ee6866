"""MiMo-VL in miniature, stage 1: the projector alone learns on captions, as in mimo_vl/stage1. `make mimo-mini`."""

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Captions are documents: a picture and the words behind it."""
    mini, kinds = configs.module("mixtures/mini"), configs.module("mixtures/mimo_vl")
    mixture = kinds.mixture(1, {"captions": mini.train("captions")})
    return Experiment(
        name="mimo_mini_stage1",
        model=mini.MODEL,
        init_from="runs/mimo_mini_start",
        data=mini.data(mixture),
        optimizer=mini.optimizer(encoder_lr=0.0, decoder_lr=0.0),
        validation=mini.validation("captions", "interleaved", *mini.SHORT),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
