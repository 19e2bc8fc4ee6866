"""A reward model of text alone on MiMo-7B, or on any language model that jvlm reads: Bradley-Terry on pairs.

    jvlm train align/mimo_7b_reward_model --data.train pairs.jsonl

`MiMo-7B-RL` is a local folder, as Hugging Face has it; put another language model's in its place.
"""

from jvlm.data.config import DataConfig
from jvlm.families.composed.reward_text import text_model
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.reward_model.task import RewardTask
from jvlm.training.config import AdaptConfig, Experiment, ExportConfig, OptimizerConfig

FOLDER = "MiMo-7B-RL"


def get_config() -> Experiment:
    """All of the language model learns, on sequences of 4,096 tokens, 64 a step."""
    return Experiment(
        name="mimo_7b_reward_model",
        model=text_model(FOLDER, Precision(remat="full")),
        decoder_from=FOLDER,
        tokenizer=FOLDER,
        adapt=AdaptConfig(labels=1),
        data=DataConfig(batch_size=8, seq_len=4096, max_patches=0, preference="pairs"),
        optimizer=OptimizerConfig(learning_rate=5e-6, encoder_lr=0.0, connector_lr=0.0),
        parallel=ParallelConfig(data=1, fsdp=-1),
        export=ExportConfig(enabled=False),
        task=RewardTask(centre=0.01),
        epochs=1.0,
        gradient_accumulation_steps=8,
    )
