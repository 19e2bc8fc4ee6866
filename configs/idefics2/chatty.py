"""Idefics2-8B's last stage, after which it is "chatty": dialogues and descriptions, adapters as in idefics2/sft_dora.

    jvlm train idefics2/chatty --init_from IDEFICS2_8B --data.train llava_conv.jsonl sharegpt4v.jsonl

Published: a few hundred steps, a large batch, LLaVA-Conv and ShareGPT4V (arXiv 2405.02246, section 4.2). Not published:
what is trained, rate, batch and length; what is trained and the rate are those of idefics2/sft_dora, and a batch is 16
times eight sequences. Turns stay in their order, as they answer each other; there is no noise, which is ours to choose.
"""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment
from jvlm.training.supervised import SupervisedTask


def get_config() -> Experiment:
    """Return idefics2/sft_dora for the tuned model, whose table has a row for each token."""
    sft = configs.load("idefics2/sft_dora")
    return dataclasses.replace(
        sft,
        name="idefics2_chatty",
        init_from="idefics2-8b",
        adapt=dataclasses.replace(sft.adapt, grow_embedding=False),
        data=dataclasses.replace(sft.data, shuffle_turns=False, max_turns=None),
        task=SupervisedTask(),
        steps=300,
        gradient_accumulation_steps=16,
    )
