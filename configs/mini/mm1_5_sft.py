"""MM1.5 in miniature, stage 3: the published ratios of kinds, pictures split as they need it, as in mm1_5/sft.

`make mm15-mini`; its ablations are sweeps of this config (tools/mini/papers.py).
"""

from jvlm import configs
from jvlm.training.config import Experiment

TASKS = ("qa", "ocr", "lines", "grounding", "math", "code", "science", "multi", "text")


def get_config() -> Experiment:
    """One to four tiles; the published limits, 4 and 9, are for photographs of many times the tile."""
    mini, paper = configs.module("mixtures/mini"), configs.module("mixtures/mm1_5")
    files = {
        "single/general": mini.train("qa"),
        "single/text_rich": mini.train("ocr", "lines"),
        "single/refer_ground": mini.train("grounding"),
        "single/math": mini.train("math"),
        "single/code": mini.train("code"),
        "single/science": mini.train("science"),
        "multi": mini.train("multi"),
        "text": mini.train("text"),
    }
    return Experiment(
        name="mm1_5_mini_sft",
        model=mini.TILED_MODEL,
        init_from="runs/mm1_5_mini_continual",
        processor=mini.tiled(min_tiles=1, max_tiles=4),
        data=mini.data(paper.mixture(files), max_patches=340),
        optimizer=mini.optimizer(),
        evaluation=mini.evaluation(*TASKS),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=200,
        log_interval_steps=20,
    )
