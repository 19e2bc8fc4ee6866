"""As continual.py, after the dense model's MLPs have become 64 experts in every second layer: MM1.5-3B-MoE.

    jvlm train mm1_5/moe --data.train ... --init_from runs/mm1_5_pretrain

Published and kept: 64 experts, two for each token, every second layer, balance loss 0.01, router z-loss 0.001. That the
experts began as copies of the dense layers is how one reader understood it; the paper does not say.
"""

import dataclasses

from jvlm import configs
from jvlm.families.mm1_5.presets import PRESETS
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return the experiment; the router's losses and loads are in the log, as router/..."""
    base = configs.load("mm1_5/continual")
    model = dataclasses.replace(PRESETS["mm1_5_3b_moe"], precision=base.model.precision)
    adapt = dataclasses.replace(base.adapt, experts=model.decoder.mlp)
    return dataclasses.replace(base, name="mm1_5_moe", model=model, adapt=adapt)
