"""Idefics2 in miniature, stage 2: pages, pairs and documents, 45 : 35 : 20, at twice the resolution."""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Pictures of 64 pixels a side are 8 x 8 patches; the table of positions has that size from the start."""
    mini = configs.module("mixtures/mini")
    members = {
        "pages": Source(mini.train("interleaved"), 45.0),
        "pairs": Source(mini.train("captions"), 35.0),
        "documents": Source(mini.train("ocr"), 20.0),
    }
    return Experiment(
        name="idefics2_mini_stage2",
        model=mini.IDEFICS2_MODEL,
        init_from="runs/idefics2_mini_stage1",
        processor=mini.crops(64),
        data=mini.data(Mixture(members), max_patches=384),
        optimizer=mini.optimizer(),
        validation=mini.validation("captions", "interleaved"),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
