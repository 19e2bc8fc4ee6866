"""Idefics2-8B, fine-tuned on conversations about images: whole images, or four crops and the image.

    jvlm train idefics2/sft --init_from DIR --data.train examples.jsonl
    jvlm train idefics2/sft --init_from DIR --data.train examples.jsonl --processor.image.no-split

Published: conversations of up to 1,024 tokens, sides of 378 to 980 pixels, splitting for half of the samples
(idefics2/sft_dora draws which; here all are, or none). Learning rate, batch and steps of the fine-tuning are not
published. Its authors found that training all of the language model diverges, and trained adapters: here the connector
is trained, and the towers only where you give them a rate.
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, OptimizerConfig


def get_config() -> Experiment:
    """Return the experiment; a sequence of 2,048 tokens has room for six split images, or 24,000 patches of any."""
    return Experiment(
        name="idefics2_sft",
        model=dataclasses.replace(families.preset("idefics2_8b"), precision=Precision(remat="attention")),
        init_from="idefics2-8b",
        processor=ProcessorConfig(image=Idefics2ImageConfig()),
        data=DataConfig(
            batch_size=8,
            seq_len=2048,
            max_patches=24_576,
            max_length=1024,
            max_image_patches=4900,
            on_too_long="truncate",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, encoder_lr=0.0, decoder_lr=0.0, beta2=0.999),
        parallel=ParallelConfig(data=1, fsdp=-1),
        epochs=1.0,
        gradient_accumulation_steps=4,
    )
