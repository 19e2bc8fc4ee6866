"""A toy MM1.5 with experts on the demo's data: tiles, index, C-Abstractor and router.

    jvlm train mm1_5/easy_vqa

It shows the parts at work and has not been tuned to learn much; the demo proper is mimo_vl/easy_vqa.
"""

from pathlib import Path

from jvlm.data.pipeline import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.data.vision.tiled import TiledMedia
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import clip_vit
from jvlm.models.layers import Numerics
from jvlm.models.vlm import VLMConfig
from jvlm.training.config import CheckpointConfig, EvaluationConfig, Experiment, ExportConfig, OptimizerConfig

DATA = Path(__file__).parents[1] / "mimo_vl" / "easy_vqa_data"


def get_config() -> Experiment:
    """Pictures of 64 x 64 are four tiles of 32 x 32 and an overview, 4 tokens each."""
    grid = 4
    model = VLMConfig(
        architecture="mm1_5",
        encoder=clip_vit(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, patch_size=8, grid=grid),
        connector=CAbstractorConfig(grid=grid, out_grid=2, hidden_size=64, depth=1),
        decoder=TransformerConfig(
            vocab_size=544,
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=128,
            qkv_bias=False,
            rope_theta=10000.0,
            mlp=MoEConfig(experts=4, intermediate_size=128),
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        ),
        image_token_id=542,
        video_token_id=543,
        vision_start_token_id=539,
        vision_end_token_id=540,
        vision_pad_token_id=541,
        bos_token_id=530,
        eos_token_id=532,
        numerics=Numerics(compute_dtype="float32", initializer_range=None),
    )
    return Experiment(
        name="mm1_5_easy_vqa",
        model=model,
        tokenizer=str(DATA / "tokenizer"),
        processor=ProcessorConfig(media=TiledMedia(max_tiles=4, num_frames=4), box_format="mm1_5"),
        data=DataConfig(
            train=(str(DATA / "train.arrayrecord"),), rows=4, row_tokens=512, row_patches=10 * (grid**2 + 1)
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.05, beta2=0.99),
        checkpoint=CheckpointConfig(every=200),
        evaluation=EvaluationConfig(data=(str(DATA / "test.arrayrecord"),), max_rows=100, max_new_tokens=24),
        export=ExportConfig(enabled=False),
        steps=400,
        log_every=20,
    )
