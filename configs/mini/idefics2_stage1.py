"""Idefics2 in miniature, stage 1: pages and pairs, 70 : 30, at low resolution, as in idefics2/pretrain.

`make idefics2-mini`. All parameters learn; mini/idefics2_stage1_lora and mini/idefics2_stage1_dora are the paper's way.
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
        init_from="runs/idefics2_mini_start",
        processor=mini.crops(32),
        data=mini.data(mixture, max_patches=192),
        optimizer=mini.optimizer(),
        validation=mini.validation("captions", "interleaved"),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
