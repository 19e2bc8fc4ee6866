"""MM1.5's second stage: text-rich images as 2 x 2 tiles of 672 pixels and an overview, 720 tokens an image.

    jvlm train mm1_5/continual --data.train ... --init_from runs/mm1_5_pretrain

Published and kept: static tiles of 1344 x 1344 pixels, 256 sequences a step, 30,000 steps, peak learning rate 1e-5,
cosine decay to 0, every tower trained. Pages of text are documents: an image and its text, without a chat template. The
position tables go from 27 x 27 to 48 x 48 positions as the stage begins.
"""

import dataclasses

from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.mm1_5.presets import GRID_672, PRESETS, at_grid
from jvlm.models.layers import Precision
from jvlm.training.config import AdaptConfig, Experiment, ExportConfig, OptimizerConfig


def get_config() -> Experiment:
    """Four images of five tiles each fill a sequence."""
    return Experiment(
        name="mm1_5_continual",
        model=dataclasses.replace(at_grid(PRESETS["mm1_5_3b"], GRID_672), precision=Precision(remat="attention")),
        init_from="runs/mm1_5_pretrain",
        adapt=AdaptConfig(grid=GRID_672),
        processor=ProcessorConfig(image=TiledImageConfig(splitting="static"), box_format="mm1_5"),
        data=DataConfig(batch_size=32, seq_len=4096, max_patches=20 * (GRID_672**2 + 1), on_bad_example="skip"),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        export=ExportConfig(enabled=False),
        steps=30_000,
        gradient_accumulation_steps=8,
        log_interval_steps=20,
    )
