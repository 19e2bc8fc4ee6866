"""Preferences on MiMo-VL-7B: DPO with LoRA, the base as reference, a picture encoded once for both answers of a pair.

    jvlm train align/mimo_vl_7b_dpo --init_from DIR --data.train pairs.jsonl

DIR is the folder of MiMo-VL-7B-SFT or -RL. Pairs are of any format in docs/alignment.md. MPO (arXiv 2411.10442) is
`--task.losses sigmoid bco_pair --task.loss_weights 0.8 0.2 --task.sft_weight 1`.
"""

import dataclasses

from jvlm.preference.pairs import PreferenceTask
from jvlm.training.config import Experiment, OptimizerConfig
from jvlm.training.recipes import finetune


def get_config() -> Experiment:
    """Sequences of 4,096 tokens, 16 a step. The reference costs a second forward pass of the decoder and no memory."""
    experiment = finetune("mimo_vl_7b", "lora", "MiMo-VL-7B-RL", ())
    return dataclasses.replace(
        experiment,
        name="mimo_vl_7b_dpo",
        data=dataclasses.replace(experiment.data, seq_len=4096, on_too_long="drop", preference="pairs"),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_ratio=0.05),
        task=PreferenceTask(reference="adapter_off"),
    )
