"""As mini/idefics2_from_start, with four times as many latents of a picture."""

import dataclasses

from jvlm import configs
from jvlm.training.config import Experiment


def get_config() -> Experiment:
    """Return mini/idefics2_from_start with another connector; all else is equal."""
    mini, other = configs.module("mixtures/mini"), configs.load("mini/idefics2_from_start")
    connector = dataclasses.replace(other.model.connector, latents=4 * mini.LATENTS)
    model = dataclasses.replace(other.model, connector=connector)
    return dataclasses.replace(other, name="idefics2_mini_more_latents", model=model)
