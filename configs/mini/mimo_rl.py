"""MiMo-VL in miniature, the last stage: reinforcement learning from several rewards at once, as in mimo_vl/morl.

`make mimo-mini`. Each kind of question has its reward (mimo_rl_data/rewards.json): overlap of boxes, points in the
element that is to be clicked, the number counted, the word read, the answer behind the reasoning. Words that are right
three times in four (qa) are not among them: most of their groups would hold eight answers alike. The tower stays as it
is, as in mimo_vl/morl: what it sees is then not lost for questions that are not asked here (docs/results/papers.md).
"""

from pathlib import Path

from jvlm import configs
from jvlm.data.config import DataConfig
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.log_config import RolloutLogConfig
from jvlm.rl.prompt_stream import PromptStreamConfig
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.task import PolicyTask
from jvlm.training.config import CheckpointConfig, Experiment, OptimizerConfig, ValidationConfig

REWARDS = Path(__file__).parent / "mimo_rl_data" / "rewards.json"
# kind of question -> how many of its examples are asked in a pass
ASKED = {"where": 3000, "grounding": 2000, "gui": 1500, "counting": 1500, "ocr": 4000, "reasoning": 200}
KEPT = ("cells", "qa")  # are watched on the part held out, as they are most easily lost


def get_config() -> Experiment:
    """Fill a sequence with the answers to one prompt, which share its picture."""
    mini = configs.module("mixtures/mini")
    return Experiment(
        name="mimo_mini_rl",
        model=mini.MODEL,
        init_from="runs/mimo_mini_stage4",
        data=DataConfig(
            train=tuple(f"{mini.DATA}/train_{name}.arrayrecord#{count}" for name, count in ASKED.items()),
            batch_size=52,
            seq_len=448,
            max_patches=64,
            max_length=112,
        ),
        task=PolicyTask(
            rollout=RolloutConfig(answers=8, max_tokens=48, temperature=0.6, slots=416, prefill_tokens=448),
            rewards=RewardConfig(file=str(REWARDS), perfect=dict.fromkeys(("grounding", "where", "cells"), 0.9)),
            prompts=PromptStreamConfig(easy_share=0.1),
            selection=SelectionConfig(groups=48),
            log=RolloutLogConfig(samples_interval_steps=10, held_out_prompts=800),
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, encoder_lr=0.0, warmup_steps=3, min_lr_ratio=0.1, weight_decay=0.0, beta2=0.99
        ),
        checkpoint=CheckpointConfig(save_interval_steps=5),
        validation=ValidationConfig(data=mini.held_out(*ASKED, *KEPT), interval_steps=10),
        evaluation=mini.evaluation(*mini.SHORT, *mini.LONG),
        export=mini.EXPORT,
        steps=40,
        log_interval_steps=5,
    )
