"""Qwen2.5-VL-72B, all parameters on sequences of 32 K: the settings of MiMo-VL stage 4 for the larger model.

jvlm train qwen2_5_vl/72b --init_from gs://bucket/Qwen2.5-VL-72B-Instruct --data.train gs://bucket/long.arrayrecord
"""

import dataclasses

from jvlm import configs, families
from jvlm.models.layers import Precision
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """128 sequences, each over four devices."""
    base = configs.load("mimo_vl/stage4")
    return dataclasses.replace(
        base,
        name="qwen2_5_vl_72b",
        topologies=("v5p:8x8x8", "h200:32x8"),
        init_from="Qwen2.5-VL-72B-Instruct",
        model=dataclasses.replace(families.preset("qwen2_5_vl_72b"), precision=Precision(remat="attention")),
        data=dataclasses.replace(base.data, batch_size=128),
    )
