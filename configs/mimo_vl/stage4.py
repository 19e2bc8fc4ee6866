"""MiMo-VL-7B, stage 4: everything learns on long sequences: documents, films, reasoning. arXiv 2506.03569, Table 1.

Batch size, schedule and warm-up are not published; those here are ours. A sequence of 32 K is split over four devices
(`context`).

    jvlm train mimo_vl/stage4 --init_from gs://bucket/runs/mimo_vl_stage3 --data.train gs://bucket/long.arrayrecord
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.data.processor_config import ProcessorConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig

BATCH_SIZE, SEQ_LEN, BUDGET = 64, 32768, 550e9


def get_config() -> Experiment:
    """Half of the tokens are media. Sequences of 32 K, each over four devices."""
    return Experiment(
        name="mimo_vl_stage4",
        topologies=("v5p:4x4x4", "v6e:16x16", "v5e:16x16", "h200:8x8"),
        model=dataclasses.replace(families.preset("mimo_vl_7b"), precision=Precision(remat="attention")),
        init_from="mimo_vl_stage3",
        # a video: 2 frames a second, 256 of them, and 16,384 tokens at most
        processor=ProcessorConfig(image=QwenImageConfig(video_max_frames=256, video_max_tokens=16384)),
        data=DataConfig(
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            max_patches=2 * SEQ_LEN,
            max_image_patches=16384,
            on_too_long="shrink",
        ),
        optimizer=OptimizerConfig(learning_rate=2.5e-5),
        parallel=ParallelConfig(data=1, fsdp=-1, context=4),
        export=ExportConfig(enabled=False),
        steps=round(BUDGET / (BATCH_SIZE * SEQ_LEN)),
    )
