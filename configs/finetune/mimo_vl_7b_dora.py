"""Fine-tune MiMo-VL-7B on your own conversations: DoRA adapters on the language model.

    jvlm train finetune/mimo_vl_7b_dora --init_from DIR --data.train examples.jsonl

DIR is the folder of MiMo-VL-7B-RL.
Planned for one GPU of 24 GB (L4).
What it needs there is in docs/results/finetune_memory.md.
A GPU of 24 GB must give JAX more than its 75 %: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
Each chip takes a sequence at a time; on N chips give `--data.batch_size N --gradient_accumulation_steps 16/N`.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("mimo_vl_7b", "dora", "MiMo-VL-7B-RL", ("l4:1",))
