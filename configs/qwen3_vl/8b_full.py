"""Fine-tune Qwen3-VL-8B on your own conversations: the language model and the connector are trained whole.

    jvlm train qwen3_vl/8b_full --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen3-VL-8B-Instruct.
Planned for one host of eight v6e, and for eight H200.
"""

import dataclasses

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 4,096 tokens, 16 a step; half of the tokens may be images."""
    base = finetune("qwen3_vl_8b", "full", "Qwen3-VL-8B-Instruct", ("v6e:2x4", "h200:8"))
    data = dataclasses.replace(base.data, batch_size=16, seq_len=4096, max_patches=8192)
    return dataclasses.replace(base, data=data, gradient_accumulation_steps=1)
