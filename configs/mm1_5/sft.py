"""MM1.5's instruction stage: each image as 4 to 9 tiles of 672 pixels and an overview after them, with an index.

    jvlm train mm1_5/sft --data.train ... --init_from runs/mm1_5_continual
    jvlm train mm1_5/sft --data.train videos.jsonl ... --init_from runs/mm1_5_sft --name mm1_5_video

Published and kept: (4, 9) tiles, 144 tokens a tile, no tiles from three images on, overview last, index (k,i,j), 24
frames of a video, 256 sequences a step, 23,000 steps, peak learning rate 2e-5, cosine decay to 0, every tower trained;
images, several images and text 80:10:10, for which see configs/mixtures/mm1_5.py.
"""

import dataclasses

from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.mm1_5.presets import GRID_672, PRESETS, at_grid
from jvlm.models.layers import Precision
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig


def get_config() -> Experiment:
    """Return the experiment; a sequence holds a video, or two images of ten tiles each and their text."""
    return Experiment(
        name="mm1_5_sft",
        model=dataclasses.replace(at_grid(PRESETS["mm1_5_3b"], GRID_672), precision=Precision(remat="attention")),
        init_from="runs/mm1_5_continual",
        processor=ProcessorConfig(image=TiledImageConfig(), box_format="mm1_5"),
        data=DataConfig(batch_size=32, seq_len=4096, max_patches=24 * (GRID_672**2 + 1), on_bad_example="skip"),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        export=ExportConfig(enabled=False),
        steps=23_000,
        gradient_accumulation_steps=8,
        log_interval_steps=20,
    )
