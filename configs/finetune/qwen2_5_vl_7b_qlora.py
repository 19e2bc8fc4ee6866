"""Fine-tune Qwen2.5-VL-7B on your own conversations: LoRA adapters on a language model in 4 bits (NF4).

    jvlm train finetune/qwen2_5_vl_7b_qlora --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen2.5-VL-7B-Instruct.
`jvlm plan finetune/qwen2_5_vl_7b_qlora --topology CHIP:N` says what it needs on N chips.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("qwen2_5_vl_7b", "qlora", "Qwen2.5-VL-7B-Instruct")
