"""A short supervised run of the demo's model, which has room to learn: `make demo-rl` begins with it."""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Take the demo's first stage, and less of its second: where a shape lies, then what it is."""
    demo = configs.load("mimo_vl/easy_vqa")
    where, shapes = demo.stages
    (test,) = demo.evaluation.data
    return dataclasses.replace(
        demo,
        name="easy_vqa_start",
        stages=(where,),
        data=shapes.data,
        optimizer=shapes.optimizer,
        evaluation=dataclasses.replace(
            demo.evaluation,
            data=(test.replace("test.", "shapes_validation."),),
            text_only_baseline=False,
            aim=None,
            aim_iou=None,
        ),
        steps=250,
    )
