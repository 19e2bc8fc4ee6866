"""Fine-tune Idefics2-8B on your own conversations: DoRA adapters on the language model.

    jvlm train finetune/idefics2_8b_dora --init_from DIR --data.train examples.jsonl

DIR is the folder of idefics2-8b.
Planned for one GPU of 24 GB (L4).
What it needs there is in docs/results/finetune_memory.md.
A GPU of 24 GB must give JAX more than its 75 %: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
Each chip takes a sequence at a time; on N chips give `--data.batch_size N --gradient_accumulation_steps 16/N`.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("idefics2_8b", "dora", "idefics2-8b", ("l4:1",))
