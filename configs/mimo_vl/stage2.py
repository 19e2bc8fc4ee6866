"""MiMo-VL-7B, stage 2: projector and vision tower learn on captions and interleaved pages. arXiv 2506.03569, Table 1.

The table prints the two learning rates in the wrong order; the authors corrected them (GitHub XiaomiMiMo/MiMo-VL,
issue 29). Batch size, schedule and warm-up are not published; those here are ours.

    jvlm train mimo_vl/stage2 --init_from gs://bucket/runs/mimo_vl_stage1 --data.train gs://bucket/interleaved.arrayrecord

Captions and pages are documents, without a chat template. A page longer than a sequence is cut between its pieces, and
every part is trained on; an image that fits no sequence is made smaller.
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.data.processor_config import ProcessorConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig

BATCH_SIZE, SEQ_LEN, BUDGET = 256, 8192, 167e9


def get_config() -> Experiment:
    """As stage 1, with the tower trained at a tenth of the projector's rate."""
    return Experiment(
        name="mimo_vl_stage2",
        topologies=("v5p:4x4x4", "v6e:16x16", "h200:8x8"),
        model=dataclasses.replace(families.preset("mimo_vl_7b"), precision=Precision(remat="attention")),
        init_from="mimo_vl_stage1",
        # a video: 2 frames a second, 256 of them, and 16,384 tokens at most
        processor=ProcessorConfig(image=QwenImageConfig(video_max_frames=256, video_max_tokens=16384)),
        data=DataConfig(
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            max_patches=3 * SEQ_LEN,
            max_image_patches=16384,
            on_too_long="shrink",
        ),
        optimizer=OptimizerConfig(encoder_lr=1e-5, connector_lr=1e-4, decoder_lr=0.0),
        parallel=ParallelConfig(data=1, fsdp=-1),
        export=ExportConfig(enabled=False),
        steps=round(BUDGET / (BATCH_SIZE * SEQ_LEN)),
    )
