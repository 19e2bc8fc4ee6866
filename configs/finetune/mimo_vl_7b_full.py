"""Fine-tune MiMo-VL-7B on your own conversations: the language model and the connector are trained whole.

    jvlm train finetune/mimo_vl_7b_full --init_from DIR --data.train examples.jsonl

DIR is the folder of MiMo-VL-7B-RL.
Planned for four H100 of 80 GB.
What it needs there is in docs/results/finetune_memory.md.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("mimo_vl_7b", "full", "MiMo-VL-7B-RL", ("h100:4",))
