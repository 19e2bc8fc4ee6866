"""MiMo-VL-7B, mixed on-policy reinforcement learning: text and multimodal tasks in one run. arXiv 2506.03569, 3.3.

The objective, the pool of easy prompts and the rule that groups are taken in the order in which they were started are
MiMo-VL's; the rate, the temperature and top-p are MiMo-7B's (arXiv 2505.07608). Group size, lengths, groups of a step
and the map of GIoU to [0, 1] are not published; those here are ours, for the chips of one machine.

    jvlm rl mimo_vl/morl --init_from DIR --data.train maths.jsonl grounding.jsonl#20000 counting.jsonl video.jsonl

DIR is the folder of MiMo-VL-7B-SFT. Examples name their task: maths (of text or pictures), choice, boxes, points,
count, span, gui, text; FILE#N says how many of a file are asked in a pass, which is how tasks are mixed. With
`--task.rewards.file rewards.json` tasks of your own are judged by reward models, plug-ins or a judge beside these.
Boxes are hardly ever perfect: `--task.rewards.perfect boxes 0.9` lets prompts whose boxes all earn that go to the easy
pool.
"""

import dataclasses

from jvlm import families
from jvlm.data.config import DataConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.losses import PolicyLoss
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.task import PolicyTask
from jvlm.training.config import CheckpointConfig, Experiment, OptimizerConfig

ANSWER, PROMPT = 12288, 4096


def get_config() -> Experiment:
    """64 groups of 16 answers a step. Engine and trainer compute in bfloat16, whose rounding is corrected for."""
    task = PolicyTask(
        policy_loss=PolicyLoss(correction="token_truncate"),
        rollout=RolloutConfig(answers=16, max_tokens=ANSWER, slots=128, prefill_tokens=PROMPT),
        rewards=RewardConfig(workers=16),
        selection=SelectionConfig(groups=64),
    )
    return Experiment(
        name="mimo_vl_morl",
        model=dataclasses.replace(families.preset("mimo_vl_7b"), precision=Precision(remat="full")),
        init_from="MiMo-VL-7B-SFT",
        data=DataConfig(
            batch_size=4,
            seq_len=ANSWER + PROMPT,
            max_patches=16384,
            max_image_patches=8192,
            on_bad_example="skip",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", encoder_lr=0.0),
        parallel=ParallelConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_steps=10),
        task=task,
        steps=1000,
        log_interval_steps=1,
    )
