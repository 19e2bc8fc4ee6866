"""Fine-tune MiMo-VL-7B on your own conversations: DoRA adapters on the language model.

    jvlm train finetune/mimo_vl_7b_dora --init_from DIR --data.train examples.jsonl

DIR is the folder of MiMo-VL-7B-RL.
`jvlm plan finetune/mimo_vl_7b_dora --topology CHIP:N` says what it needs on N chips.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("mimo_vl_7b", "dora", "MiMo-VL-7B-RL")
