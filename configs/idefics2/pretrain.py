"""Idefics2's first stage: images of up to 384 pixels and the text around them.

    jvlm train idefics2/pretrain --tokenizer DIR --data.train examples.jsonl

An image is 64 tokens of the text; idefics2/pretrain_cross_attention has the paper's other architecture. As published:
2,048 tokens, learning rate 1e-4, weight decay 0.1. Pages, pairs and text are documents, without a chat template. As in
the authors' code, a page that is too long gives a part that begins at random, more often before an image; pages with
three images in a row or two at their end are left out; documents share a segment, up to a whole sequence. The authors
start from SigLIP and Mistral and train adapters (idefics2/stage1_lora); here towers begin at random unless they are
brought in with `jvlm.weights.backbones`. For the second stage, at 980 pixels, the position table is resized with
`jvlm.weights.positions.with_grid(model, 70)`.
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.data.document_config import DocumentConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, OptimizerConfig

GRID = 27
PAGES = DocumentConfig(cut="sample_window", window_bonus=2.0, max_images_in_a_row=2, max_images_at_end=1, join=31)


def get_config() -> Experiment:
    """Images are 27 x 27 patches; a sequence has room for 31 of them, whichever way they are read."""
    model = families.preset("idefics2_8b")
    model = dataclasses.replace(
        model,
        encoder=dataclasses.replace(model.encoder, grid=GRID),
        connector=dataclasses.replace(model.connector, min_image_patches=GRID**2),
        precision=Precision(remat="attention"),
    )
    return Experiment(
        name="idefics2_pretrain",
        model=model,
        tokenizer="tokenizers/idefics2",
        processor=ProcessorConfig(image=Idefics2ImageConfig(longest_edge=384, shortest_edge=378, split=False)),
        data=DataConfig(
            batch_size=16, seq_len=2048, max_patches=31 * GRID**2, max_image_patches=GRID**2, documents=PAGES
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, beta2=0.999),
        parallel=ParallelConfig(data=1, fsdp=-1),
        topologies=("v5p:2x2x4",),
        steps=80_000,
        gradient_accumulation_steps=16,
        log_interval_steps=20,
    )
