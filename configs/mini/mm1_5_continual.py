"""MM1.5 in miniature, stage 2: pictures with words at twice the resolution, 2 x 2 tiles, as in mm1_5/continual."""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Equal shares of words, strips of words, and sums; 20 tokens a picture."""
    mini = configs.module("mixtures/mini")
    kinds = ("ocr", "lines", "math")
    return Experiment(
        name="mm1_5_mini_continual",
        model=mini.TILED_MODEL,
        init_from="runs/mm1_5_mini_pretrain",
        processor=mini.tiled(splitting="static"),
        data=mini.data(Mixture({kind: Source(mini.train(kind)) for kind in kinds}), max_patches=340),
        optimizer=mini.optimizer(),
        validation=mini.validation("captions", *kinds),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
