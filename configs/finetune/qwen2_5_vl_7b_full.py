"""Fine-tune Qwen2.5-VL-7B on your own conversations: the language model and the connector are trained whole.

    jvlm train finetune/qwen2_5_vl_7b_full --init_from DIR --data.train examples.jsonl

DIR is the folder of Qwen2.5-VL-7B-Instruct.
Planned for four H100 of 80 GB.
What it needs there is in docs/results/finetune_memory.md.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("qwen2_5_vl_7b", "full", "Qwen2.5-VL-7B-Instruct", ("h100:4",))
