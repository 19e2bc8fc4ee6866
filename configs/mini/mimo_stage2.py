"""MiMo-VL in miniature, stage 2: projector and tower learn on captions and pages, as in mimo_vl/stage2."""

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Train the tower as fast as the projector: it begins at random, where MiMo-VL's was pretrained."""
    mini, kinds = configs.module("mixtures/mini"), configs.module("mixtures/mimo_vl")
    mixture = kinds.mixture(2, {name: mini.train(name) for name in kinds.kinds(2)})
    return Experiment(
        name="mimo_mini_stage2",
        model=mini.MODEL,
        init_from="runs/mimo_mini_stage1",
        data=mini.data(mixture),
        optimizer=mini.optimizer(decoder_lr=0.0),
        validation=mini.validation("captions", "interleaved", *mini.SHORT),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=150,
        log_interval_steps=20,
    )
