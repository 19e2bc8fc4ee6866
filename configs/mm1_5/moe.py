"""As continual.py, after the dense model's MLPs have become 64 experts in every second layer: MM1.5-3B-MoE.

    jvlm train mm1_5/moe --data.train ... --init_from runs/mm1_5_pretrain

Published and kept: 64 experts, two for each token, every second layer, balance loss 0.01, router z-loss 0.001. That the
experts began as copies of the dense layers is how one reader understood it; the paper does not say.
"""

from jvlm.data.pipeline import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.data.vision.tiled import TiledMedia
from jvlm.models.mm1_5 import GRID_672, MM1_5
from jvlm.training.config import AdaptConfig, Experiment, ExportConfig, OptimizerConfig


def get_config() -> Experiment:
    """The router's losses and loads are in the log, as router/..."""
    experts = MM1_5["mm1_5_3b_moe"].decoder.mlp
    return Experiment(
        name="mm1_5_moe",
        init_from="runs/mm1_5_pretrain",
        adapt=AdaptConfig(grid=GRID_672, experts=experts),
        processor=ProcessorConfig(media=TiledMedia(splitting="static"), box_format="mm1_5"),
        data=DataConfig(rows=32, row_tokens=4096, row_patches=20 * (GRID_672**2 + 1), on_bad_row="skip"),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        export=ExportConfig(enabled=False),
        steps=30_000,
        accumulation=8,
        log_every=20,
    )
