"""Fine-tune Qwen3-VL-8B on your own conversations: LoRA adapters on the language model.

    jvlm train qwen3_vl/8b_lora --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen3-VL-8B-Instruct.
Each chip takes a sequence at a time; on N chips give `--data.batch_size N --gradient_accumulation_steps 16/N`.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("qwen3_vl_8b", "lora", "Qwen3-VL-8B-Instruct", ())
