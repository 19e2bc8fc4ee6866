"""Idefics2-8B's fine-tuning: DoRA on both towers, connector and new tokens trained whole, noise and varied examples.

    jvlm train idefics2/sft_dora --init_from IDEFICS2_8B_BASE --data.train cauldron/*.arrayrecord
    jvlm train idefics2/sft_dora --init_from IDEFICS2_8B_BASE --data.train examples.jsonl --adapter.no-use_dora

As published: DoRA, examples of up to 1,024 tokens, sides of 378 to 980 pixels, NEFTune, turns shuffled (at most seven),
half of the images made up to twice as large, the images of half of the examples split. In the authors' code, images
come before the first question, and 5 % of the questions begin on a new line. Not published: learning rate, batch, steps
and rank; see idefics2/stage1_lora for where they come from.
"""

import dataclasses

from jvlm import configs
from jvlm.data.config import ImageChoice
from jvlm.training.config import Experiment
from jvlm.training.supervised import SupervisedTask


def get_config() -> Experiment:
    """Return the data of idefics2/sft, varied, with the adapters of idefics2/stage1_lora as DoRA."""
    first, sft = configs.load("idefics2/stage1_lora"), configs.load("idefics2/sft")
    return dataclasses.replace(
        sft,
        name="idefics2_sft_dora",
        init_from="idefics2-8b-base",
        adapter=dataclasses.replace(first.adapter, use_dora=True),
        adapt=dataclasses.replace(sft.adapt, grow_embedding=True),
        data=dataclasses.replace(
            sft.data,
            shuffle_turns=True,
            max_turns=7,
            media_first=True,
            newline_probability=0.05,
            image_choices=(ImageChoice(("split=true",)), ImageChoice(("split=false",))),
            upscale_probability=0.5,
            upscale_range=(1.5, 2.0),
            upscale_longest_edge=980,
        ),
        optimizer=dataclasses.replace(first.optimizer, warmup_steps=None, warmup_ratio=0.03),
        task=SupervisedTask(neftune_alpha=5.0, neftune_where="merged"),
    )
