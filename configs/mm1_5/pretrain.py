"""MM1.5's first stage: 378 pixels, no tiles, 144 tokens an image; captions, interleaved documents and text, 50:10:40.

    jvlm train mm1_5/pretrain --data.train ... --tokenizer DIR    # Qwen2.5-VL's: the presets have its vocabulary

Published and kept: resolution, tokens, sequence length, 512 sequences a step, steps, every tower trained. Not
published: learning rate, warm-up and decay (those here are of the usual size). jvlm has AdamW, not AdaFactor, and one
list of data: mix the files in the ratio wanted. Captions, pages and text are documents, without a chat template, of at
most 16 images, as published; what a page has beyond is another document. Both towers begin at random; the paper begins
from a CLIP tower and a language model.
"""

import dataclasses

from jvlm.data.config import DataConfig
from jvlm.data.document_config import DocumentConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.mm1_5.presets import GRID_378, PRESETS, at_grid
from jvlm.models.layers import Precision
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig

IMAGES = 16  # of a sequence, and of a document


def get_config() -> Experiment:
    """Up to 16 images of 27 x 27 patches and a class token fill a sequence."""
    model = at_grid(PRESETS["mm1_5_3b"], GRID_378)
    return Experiment(
        name="mm1_5_pretrain",
        model=dataclasses.replace(model, precision=Precision(remat="attention")),
        tokenizer="tokenizer",
        processor=ProcessorConfig(image=TiledImageConfig(splitting="none"), box_format="mm1_5"),
        data=DataConfig(
            batch_size=64,
            seq_len=4096,
            max_patches=IMAGES * (GRID_378**2 + 1),
            on_bad_example="skip",
            documents=DocumentConfig(max_images=IMAGES),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_ratio=0.01, min_lr_ratio=0.1),
        export=ExportConfig(enabled=False),
        steps=200_000,
        gradient_accumulation_steps=8,
        log_interval_steps=20,
    )
