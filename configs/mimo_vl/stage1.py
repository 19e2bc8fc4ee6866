"""MiMo-VL-7B, stage 1: the projector alone learns on image-caption pairs. arXiv 2506.03569, Table 1.

Batch size, schedule and warm-up are not published; those here are ours. Give the data and what to start from:

    jvlm train mimo_vl/stage1 --init_from gs://bucket/mimo-vl-7b-start --data.train gs://bucket/captions.arrayrecord

The start is the tower of Qwen2.5-VL-72B, MiMo-7B-Base, and a random projector. Captions are documents (an image and
the text behind it, without a chat template); ``--data.caption_prompt TEXT`` makes answers of them.
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.data.processor_config import ProcessorConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig

BATCH_SIZE, SEQ_LEN, BUDGET = 256, 8192, 300e9


def get_config() -> Experiment:
    """Captions are short, images fill the sequences: three quarters of the tokens are media."""
    return Experiment(
        name="mimo_vl_stage1",
        topologies=("v5p:4x4x4", "v6e:16x16", "h200:8x8"),
        model=dataclasses.replace(families.preset("mimo_vl_7b"), precision=Precision(remat="attention")),
        init_from="mimo_vl_7b_start",
        # a video: 2 frames a second, 256 of them, and 16,384 tokens at most
        processor=ProcessorConfig(image=QwenImageConfig(video_max_frames=256, video_max_tokens=16384)),
        data=DataConfig(
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            max_patches=3 * SEQ_LEN,
            max_image_patches=16384,
            on_too_long="shrink",
        ),
        optimizer=OptimizerConfig(encoder_lr=0.0, connector_lr=1e-3, decoder_lr=0.0),
        parallel=ParallelConfig(data=1, fsdp=-1),
        export=ExportConfig(enabled=False),
        steps=round(BUDGET / (BATCH_SIZE * SEQ_LEN)),
    )
