"""Fine-tune Qwen2.5-VL-3B on your own conversations: DoRA adapters on the language model.

    jvlm train finetune/qwen2_5_vl_3b_dora --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen2.5-VL-3B-Instruct.
Planned for one GPU of 24 GB (L4).
What it needs there is in docs/results/finetune_memory.md.
Each chip takes a sequence at a time; on N chips give `--data.batch_size N --gradient_accumulation_steps 16/N`.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("qwen2_5_vl_3b", "dora", "Qwen2.5-VL-3B-Instruct", ("l4:1",))
