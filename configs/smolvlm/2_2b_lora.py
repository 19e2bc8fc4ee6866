"""Fine-tune SmolVLM2-2.2B on your own conversations: LoRA adapters on the language model.

    jvlm train smolvlm/2_2b_lora --init_from DIR --data.train examples.jsonl

DIR is the folder of SmolVLM2-2.2B-Instruct.
Each chip takes a sequence at a time; on N chips give `--data.batch_size N --gradient_accumulation_steps 16/N`.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("smolvlm2_2_2b", "lora", "SmolVLM2-2.2B-Instruct", ())
