"""Qwen3-VL-32B, all parameters on sequences of 32 K.

Batch size, schedule and warm-up are ours. A sequence is split over four devices (`context`).

    jvlm train qwen3_vl/32b --init_from gs://bucket/Qwen3-VL-32B-Instruct --data.train gs://bucket/long.arrayrecord
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, ExportConfig, OptimizerConfig

BATCH_SIZE, SEQ_LEN = 32, 32768


def get_config() -> Experiment:
    """Half of the tokens may be images. Sequences of 32 K, each over four devices."""
    return Experiment(
        name="qwen3_vl_32b",
        topologies=("v5p:4x4x4",),
        model=dataclasses.replace(families.preset("qwen3_vl_32b"), precision=Precision(remat="attention")),
        init_from="Qwen3-VL-32B-Instruct",
        data=DataConfig(
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            max_patches=2 * SEQ_LEN,
            max_image_patches=16384,
            on_too_long="shrink",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        parallel=ParallelConfig(data=1, fsdp=-1, context=4),
        export=ExportConfig(enabled=False),
        steps=1000,
    )
