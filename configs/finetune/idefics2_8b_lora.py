"""Fine-tune Idefics2-8B on your own conversations: LoRA adapters on the language model.

    jvlm train finetune/idefics2_8b_lora --init_from DIR --data.train examples.jsonl

DIR is the folder of idefics2-8b.
`jvlm plan finetune/idefics2_8b_lora --topology CHIP:N` says what it needs on N chips.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("idefics2_8b", "lora", "idefics2-8b")
