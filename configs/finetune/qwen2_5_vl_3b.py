"""Fine-tune Qwen2.5-VL-3B on your own conversations: language model and projector learn, the vision tower is frozen.

    jvlm data check examples.jsonl --model DIR
    jvlm train finetune/qwen2_5_vl_3b --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen2.5-VL-3B-Instruct, as `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIR` leaves it.
`--optimizer.encoder_lr 1e-6` trains the vision tower too.

Memory: `jvlm plan finetune/qwen2_5_vl_3b --topology h100:1` compiles to 64 GiB: parameters 14, Adam's moments 23, in
float32; gradients and what comes and goes 24; activations 2. By default JAX takes 75 % of a GPU, 59 GiB of an H100's:
set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, or take one H200, or two H100s, which share all of it. The 7B model takes more
than twice as much.
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import CheckpointConfig, Experiment, OptimizerConfig


def get_config() -> Experiment:
    """Sequences of 4,096 tokens, 16 a step, one at a time on each device."""
    return Experiment(
        name="qwen2_5_vl_3b_finetune",
        topologies=("h200:1", "h100:2", "v5p:2x2x1"),
        model=dataclasses.replace(families.preset("qwen2_5_vl_3b"), precision=Precision(remat="full")),
        init_from="Qwen2.5-VL-3B-Instruct",
        data=DataConfig(batch_size=4, seq_len=4096, max_patches=8192, on_too_long="shrink"),
        optimizer=OptimizerConfig(learning_rate=1e-5, encoder_lr=0.0, weight_decay=0.0),
        parallel=ParallelConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_steps=200),
        epochs=1.0,
        gradient_accumulation_steps=4,
    )
