"""Idefics2's second stage: pages and documents of up to 980 pixels, from the merged model of the first, under new LoRA.

    jvlm train idefics2/stage2_lora --init_from MERGED --data.train pages.jsonl pairs.jsonl documents.jsonl

The position table grows from 27 x 27 to 70 x 70, as in the authors' script. As published: interleaved pages 45 % of the
examples, pairs 35 %, documents 20 %; 2,048 tokens. Adapter and optimizer are those of idefics2/stage1_lora, and how
pages are cut, left out and put together is that of idefics2/pretrain.
"""

import dataclasses

from jvlm import configs, families
from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.training.config import AdaptConfig, Experiment


def get_config() -> Experiment:
    """Sequences of 2,048 tokens have room for 24,576 patches, five of the largest images."""
    first = configs.load("idefics2/stage1_lora")
    return dataclasses.replace(
        first,
        name="idefics2_stage2_lora",
        model=dataclasses.replace(families.preset("idefics2_8b"), precision=first.model.precision),
        topologies=(),
        tokenizer=None,
        encoder_from=None,
        decoder_from=None,
        init_from="idefics2-stage1-merged",
        adapt=AdaptConfig(grid=70, grid_scale=(70 + 0.1) / 27),
        processor=ProcessorConfig(image=Idefics2ImageConfig(split=False)),
        data=DataConfig(
            batch_size=16,
            seq_len=2048,
            max_patches=24_576,
            max_image_patches=4900,
            on_too_long="truncate",
            documents=first.data.documents,
        ),
    )
