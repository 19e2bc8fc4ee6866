"""Fine-tune SmolVLM2-256M on your own conversations: the language model and the connector are trained whole.

    jvlm train smolvlm/256m_full --init_from DIR --data.train examples.jsonl

DIR is the folder of SmolVLM2-256M-Video-Instruct.
"""

from jvlm.training.config import Experiment
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 2,048 tokens, 16 a step."""
    return finetune("smolvlm2_256m", "full", "SmolVLM2-256M-Video-Instruct", ())
