"""Reinforcement learning of the demo's model: boxes and words, rewarded where they are right. `make demo-rl`."""

import dataclasses
from pathlib import Path

from jvlm import configs
from jvlm.data.config import DataConfig
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.log_config import RolloutLogConfig
from jvlm.rl.prompt_stream import PromptStreamConfig
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.task import PolicyTask
from jvlm.training.config import CheckpointConfig, Experiment, ValidationConfig
from jvlm.training.optimizer.config import OptimizerConfig

HERE = Path(__file__).parent


def get_config() -> Experiment:
    """Start from the short supervised run; the answers to one prompt fill a sequence and share its picture."""
    start = configs.load("align/easy_vqa_start")
    questions = HERE.parent / "mimo_vl" / "easy_vqa_data"
    return Experiment(
        name="easy_vqa_rl",
        init_from="runs/easy_vqa_start/hf",
        data=DataConfig(
            train=(str(questions / "shapes.arrayrecord"),),
            batch_size=68,
            seq_len=448,
            max_patches=128,
            max_length=96,
        ),
        task=PolicyTask(
            rollout=RolloutConfig(answers=8, max_tokens=32, temperature=0.5, slots=512, prefill_tokens=512),
            rewards=RewardConfig(file=str(HERE / "easy_vqa_rl_data" / "rewards.json")),
            prompts=PromptStreamConfig(easy_share=0.1),
            selection=SelectionConfig(groups=64),
            log=RolloutLogConfig(samples_interval_steps=10, held_out_prompts=1135),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=3, min_lr_ratio=0.05, weight_decay=0.0, beta2=0.99),
        checkpoint=CheckpointConfig(save_interval_steps=20),
        # by these images settings are chosen, and on those the run is scored: no image is in two of the three files
        validation=ValidationConfig(data=(str(questions / "shapes_validation.arrayrecord"),), interval_steps=10),
        evaluation=dataclasses.replace(
            start.evaluation,
            data=(str(questions / "shapes_test.arrayrecord"),),
            before_training=True,
            aim_gain=0.0,
            aim_iou_gain=0.05,
        ),
        steps=40,
        log_interval_steps=5,
    )
