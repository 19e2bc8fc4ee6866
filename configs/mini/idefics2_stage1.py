"""Idefics2 in miniature, stage 1: pages and pairs, 70 : 30, at low resolution, as in idefics2/pretrain.

`make idefics2-mini`. Both towers begin at random and are trained whole, as there is nothing to put adapters on yet.
"""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Pictures of 32 pixels a side are 4 x 4 patches."""
    mini = configs.module("mixtures/mini")
    mixture = Mixture({"pages": Source(mini.train("interleaved"), 70.0), "pairs": Source(mini.train("captions"), 30.0)})
    return Experiment(
        name="idefics2_mini_stage1",
        model=mini.IDEFICS2_MODEL,
        tokenizer=mini.IDEFICS2_TOKENIZER,
        processor=mini.crops(32),
        data=mini.data(mixture, max_patches=192),
        optimizer=mini.optimizer(),
        validation=mini.validation("captions", "interleaved"),
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
