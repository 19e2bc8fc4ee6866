"""Idefics2 in miniature, before stage 1: words, and pictures with their captions, in the place of Mistral and SigLIP.

`make idefics2-mini`. No tower as small as this is there pretrained, and adapters need one: all parts learn here, where
the paper starts from two towers that have never seen each other.
"""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Half of the examples are words alone; pictures have 32 pixels a side."""
    mini = configs.module("mixtures/mini")
    mixture = Mixture({"words": Source(mini.train("language")), "pairs": Source(mini.train("captions"))})
    return Experiment(
        name="idefics2_mini_start",
        model=mini.IDEFICS2_MODEL,
        tokenizer=mini.IDEFICS2_TOKENIZER,
        processor=mini.crops(32),
        data=mini.data(mixture, max_patches=192),
        optimizer=mini.optimizer(),
        validation=mini.validation("captions", "language"),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
