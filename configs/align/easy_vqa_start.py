"""A short supervised run of the demo's model, which has room to learn: `make demo-rl` begins with it."""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Take a fifth of the demo's steps, in the same order."""
    demo = configs.load("mimo_vl/easy_vqa")
    steps = {"where": 120, "shapes": 100}
    return dataclasses.replace(
        demo,
        name="easy_vqa_start",
        stages=tuple(dataclasses.replace(stage, steps=steps[stage.name]) for stage in demo.stages),
        evaluation=dataclasses.replace(
            demo.evaluation, max_examples=100, text_only_baseline=False, aim=None, aim_iou=None
        ),
        steps=160,
    )
