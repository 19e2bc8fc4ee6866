"""Idefics2 in miniature, the last stage: dialogues and descriptions in whole sentences, after which it is "chatty".

`make idefics2-mini`. The paper goes on from instruction tuning for a few hundred steps with large batches on LLaVA-Conv
and ShareGPT4V (section 4.2), as benchmarks want short answers and people do not; rates and sizes are ours. As
idefics2/chatty.
"""

import dataclasses

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment
from jvlm.training.supervised import SupervisedTask

KINDS = ("dialogue", "descriptions")


def get_config() -> Experiment:
    """Take twice the batch and the length of mini/idefics2_sft; ask what it is asked, and what this stage adds."""
    mini, sft = configs.module("mixtures/mini"), configs.load("mini/idefics2_sft")
    mixture = Mixture({kind: Source(mini.train(kind)) for kind in KINDS})
    evaluation = mini.evaluation(*configs.module("mini/idefics2_sft").TASKS, *KINDS)
    return dataclasses.replace(
        sft,
        name="idefics2_mini_chatty",
        init_from="runs/idefics2_mini_sft",
        data=mini.data(mixture, seq_len=320, batch_size=16, max_patches=384),
        optimizer=mini.optimizer(learning_rate=1e-3),
        validation=mini.validation(*KINDS),
        task=SupervisedTask(),
        evaluation=dataclasses.replace(evaluation, max_new_tokens=96),
        steps=80,
    )
