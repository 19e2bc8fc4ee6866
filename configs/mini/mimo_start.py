"""MiMo-VL in miniature, before stage 1: a language model of its own, in the place of MiMo-7B-Base. `make mimo-mini`.

The tower of vision stays random, as no pretrained one is as small as this: stages 2 and 3 have more to teach it than
MiMo-VL's have.
"""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Words alone: sentences, sums with their ways, lists, boxes without pictures."""
    mini = configs.module("mixtures/mini")
    return Experiment(
        name="mimo_mini_start",
        model=mini.MODEL,
        tokenizer=mini.TOKENIZER,
        processor=mini.PROCESSOR,
        data=mini.data(Mixture({"language": Source(mini.train("language"))}), max_patches=0),
        optimizer=mini.optimizer(encoder_lr=0.0, connector_lr=0.0),
        validation=mini.validation("language"),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=200,
        log_interval_steps=20,
    )
