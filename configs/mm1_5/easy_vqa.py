"""A toy MM1.5 with experts on the demo's data: tiles, index, C-Abstractor and router.

    jvlm train mm1_5/easy_vqa

It shows the parts at work and has not been tuned to learn much; the demo proper is mimo_vl/easy_vqa.
"""

import dataclasses

from jvlm import configs
from jvlm.data.processor import ProcessorConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.encoders.vit import clip_vit
from jvlm.training.config import CheckpointConfig, Experiment, ExportConfig, OptimizerConfig


def get_config() -> Experiment:
    """Images of 64 x 64 are four tiles of 32 x 32 and an overview, 4 tokens each."""
    grid, base = 4, configs.load("mimo_vl/easy_vqa")
    decoder = dataclasses.replace(
        base.model.decoder,
        hidden_size=64,
        intermediate_size=128,
        qkv_bias=False,
        rope_theta=10000.0,
        mrope_section=None,
        mlp=MoEConfig(experts=4, intermediate_size=128),
    )
    model = dataclasses.replace(
        base.model,
        family="mm1_5",
        encoder=clip_vit(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, patch_size=8, grid=grid),
        connector=CAbstractorConfig(grid=grid, out_grid=2, hidden_size=64, depth=1),
        decoder=decoder,
    )
    return dataclasses.replace(
        base,
        name="mm1_5_easy_vqa",
        stages=(),
        model=model,
        processor=ProcessorConfig(image=TiledImageConfig(max_tiles=4, num_frames=4), box_format="mm1_5"),
        data=dataclasses.replace(base.data, batch_size=4, max_patches=10 * (grid**2 + 1)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.05, beta2=0.99),
        checkpoint=CheckpointConfig(save_interval_steps=200),
        evaluation=dataclasses.replace(
            base.evaluation, max_examples=100, max_new_tokens=24, batch_size=64, aim=None, aim_iou=None
        ),
        export=ExportConfig(enabled=False),
        steps=400,
        log_interval_steps=20,
    )
