"""MiMo-VL in miniature, stage 3: everything learns on the whole mixture, as in mimo_vl/stage3. `make mimo-mini`.

The stage has three parts. At this size a place is learned in a minute where little else is asked, and hardly at all
where everything is; so places come first, then what has to be told apart, then all.
"""

import dataclasses

from jvlm import configs
from jvlm.data.mixture.config import Phase, Source
from jvlm.training.config import Experiment

ALL = {
    "captions": 0.3,
    "interleaved": 0.3,
    "text": 0.6,
    "ocr": 2.0,
    "grounding": 3.0,
    "counting": 1.5,
    "qa": 3.0,
    "video": 1.0,
    "gui": 1.0,
    "instruction": 0.6,
    "reasoning": 0.8,
}
PLACES = {**dict.fromkeys(ALL, 0.0), "grounding": 3.0, "gui": 1.0}
SHAPES = {**PLACES, "qa": 3.0, "ocr": 2.0, "counting": 1.0}


def get_config() -> Experiment:
    """MiMo-VL's kinds, and counting as one of its own."""
    mini, kinds = configs.module("mixtures/mini"), configs.module("mixtures/mimo_vl")
    mixture = kinds.mixture(3, {name: mini.train(name) for name in kinds.kinds(3)})
    members = {**mixture.members, "counting": Source(mini.train("counting"))}
    members = {name: dataclasses.replace(member, weight=PLACES[name]) for name, member in members.items()}
    schedule = (Phase(0.15, SHAPES), Phase(0.4, ALL))
    return Experiment(
        name="mimo_mini_stage3",
        model=mini.MODEL,
        init_from="runs/mimo_mini_stage2",
        data=mini.data(dataclasses.replace(mixture, members=members, schedule=schedule)),
        optimizer=mini.optimizer(learning_rate=2.5e-3),
        validation=mini.validation("captions", "interleaved", *mini.SHORT),
        evaluation=mini.evaluation(*mini.SHORT, *mini.LONG),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=700,
        log_interval_steps=40,
    )
