"""Fine-tune Idefics2-8B on your own conversations: the language model and the connector are trained whole.

    jvlm train finetune/idefics2_8b_full --init_from DIR --data.train examples.jsonl

DIR is the folder of idefics2-8b.
Planned for four H100 of 80 GB.
What it needs there is in docs/results/finetune_memory.md.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("idefics2_8b", "full", "idefics2-8b", ("h100:4",))
