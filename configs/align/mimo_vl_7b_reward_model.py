"""A multimodal reward model on MiMo-VL-7B: Bradley-Terry on pairs, LoRA and a matrix of one score.

    jvlm train align/mimo_vl_7b_reward_model --init_from DIR --data.train pairs.jsonl
    jvlm reward-check runs/mimo_vl_7b_reward_model --data held_out_pairs.jsonl --fit_scale

DIR is the folder of MiMo-VL-7B-SFT or -RL. MiMo-VL's reward models were trained from MiMo-7B and MiMo-VL-7B with the
same loss (arXiv 2506.03569, section 3.2); learning rate and sizes are not published, and those here are ours.
"""

import dataclasses

from jvlm.adapters.config import AdapterConfig
from jvlm.reward_model.task import RewardTask
from jvlm.training.config import AdaptConfig, Experiment, OptimizerConfig
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 4,096 tokens, 16 a step."""
    experiment = finetune("mimo_vl_7b", "lora", "MiMo-VL-7B-RL", ())
    return dataclasses.replace(
        experiment,
        name="mimo_vl_7b_reward_model",
        adapt=AdaptConfig(labels=1),
        adapter=AdapterConfig(dropout=0.05, targets=("decoder",), train_modules=("score",)),
        data=dataclasses.replace(experiment.data, seq_len=4096, on_too_long="drop", preference="pairs"),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_ratio=0.05),
        task=RewardTask(centre=0.01),
    )
