"""Idefics2 in miniature, instruction tuning: sets as the Cauldron has them, shuffled turns, NEFTune.

As idefics2/sft_dora. `make idefics2-mini`; its ablations are sweeps of this config (tools/mini/papers.py).
"""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment
from jvlm.training.supervised import SupervisedTask

TIMES = {"qa": 0.2, "ocr": 0.5, "lines": 0.5, "grounding": 0.3, "counting": 0.3, "math": 0.5, "instruction": 0.5}
TASKS = ("qa", "ocr", "lines", "grounding", "counting", "math")


def get_config() -> Experiment:
    """Weigh a set by how often it is gone through, as configs/mixtures/cauldron.py does; the numbers are ours."""
    mini = configs.module("mixtures/mini")
    members = {name: Source(mini.train(name), times) for name, times in TIMES.items()}
    return Experiment(
        name="idefics2_mini_sft",
        model=mini.IDEFICS2_MODEL,
        init_from="runs/idefics2_mini_stage2",
        processor=mini.crops(64),
        data=mini.data(
            Mixture(members, unit="times"), max_patches=384, shuffle_turns=True, max_turns=7, media_first=True
        ),
        optimizer=mini.optimizer(),
        task=SupervisedTask(neftune_alpha=5.0, neftune_where="merged"),
        evaluation=mini.evaluation(*TASKS),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=200,
        log_interval_steps=20,
    )
