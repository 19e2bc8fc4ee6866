"""MiMo-VL in miniature, stage 4: long sequences, as in mimo_vl/stage4: pages, films, lists, reasoning."""

import dataclasses

from jvlm import configs
from jvlm.data.mixture.config import Source
from jvlm.training.config import Experiment

LONG = 0.6  # weight of each kind that the stage adds
# what a model of this size forgets first, words that are read and places, goes on at a larger share than before
KEPT = {"ocr": 4.0, "grounding": 5.0, "gui": 2.0}


def get_config() -> Experiment:
    """Sequences are four times as long; what the earlier stages had goes on."""
    mini, kinds = configs.module("mixtures/mini"), configs.module("mixtures/mimo_vl")
    before = {**configs.module("mini/mimo_stage3").ALL, **KEPT}
    mixture = kinds.mixture(4, {name: mini.train(name) for name in kinds.kinds(4)})
    members = {**mixture.members, "counting": Source(mini.train("counting"))}
    members = {name: dataclasses.replace(member, weight=before.get(name, LONG)) for name, member in members.items()}
    return Experiment(
        name="mimo_mini_stage4",
        model=mini.MODEL,
        init_from="runs/mimo_mini_stage3",
        data=mini.data(dataclasses.replace(mixture, members=members), seq_len=640, batch_size=2, max_patches=768),
        optimizer=mini.optimizer(learning_rate=1.2e-3),
        validation=mini.validation("captions", "interleaved", *mini.SHORT, *mini.LONG),
        evaluation=mini.evaluation(*mini.SHORT, *mini.LONG),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=160,
        log_interval_steps=20,
    )
