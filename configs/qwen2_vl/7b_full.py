"""Fine-tune Qwen2-VL-7B on your own conversations: the language model and the connector are trained whole.

    jvlm train qwen2_vl/7b_full --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen2-VL-7B-Instruct.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("qwen2_vl_7b", "full", "Qwen2-VL-7B-Instruct", ())
