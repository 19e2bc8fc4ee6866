"""Fine-tune Qwen2.5-VL-7B on your own conversations: LoRA adapters on a language model in 4 bits (NF4).

    jvlm train finetune/qwen2_5_vl_7b_qlora --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen2.5-VL-7B-Instruct.
Planned for one v5e (16 GiB) or one GPU of 24 GB (L4).
What it needs there is in docs/results/finetune_memory.md.
Each chip takes a sequence at a time; on N chips give `--data.batch_size N --gradient_accumulation_steps 16/N`.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("qwen2_5_vl_7b", "qlora", "Qwen2.5-VL-7B-Instruct", ("v5e:1", "l4:1"))
