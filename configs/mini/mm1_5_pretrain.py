"""MM1.5 in miniature, stage 1: captions, pages and words, 50 : 10 : 40, as in mm1_5/pretrain. `make mm15-mini`."""

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Every picture is one tile of 32 x 32 pixels; all parts begin at random, and all are trained."""
    mini = configs.module("mixtures/mini")
    mixture = Mixture(
        {
            "captions": Source(mini.train("captions"), 50.0),
            "interleaved": Source(mini.train("interleaved"), 10.0),
            "text": Source(mini.train("language"), 40.0),
        }
    )
    return Experiment(
        name="mm1_5_mini_pretrain",
        model=mini.TILED_MODEL,
        tokenizer=mini.TOKENIZER,
        processor=mini.tiled(splitting="none"),
        data=mini.data(mixture, max_patches=204),
        optimizer=mini.optimizer(),
        validation=mini.validation("captions", "interleaved", "language"),
        checkpoint=mini.CHECKPOINT,
        export=mini.EXPORT,
        steps=100,
        log_interval_steps=20,
    )
