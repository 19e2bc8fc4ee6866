"""Settings of the image processor that are drawn for each example: half of the images split, one of several sizes."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jvlm import config as config_tree
from jvlm.data.config import ImageChoice
from jvlm.data.content import Parsed
from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.errors import UserError

Config = TypeVar("Config", bound=ImageProcessorConfig)


def settings_of(choice: ImageChoice) -> dict[str, Any]:
    """Return the settings of a choice as values. Raises UserError for one that is not of the form NAME=VALUE."""
    found = {}
    for setting in choice.settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise UserError(f"data.image_choices: {setting!r} is not of the form NAME=VALUE, like split=false")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:  # a word is a word
            found[name.strip()] = value.strip()
    return found


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the settings of an image processor with some of its fields changed; any of them, unlike an example's.

    Raises:
      UserError: a field that it does not have, or a value that is none of the field.
    """
    if not settings:
        return config
    hints = _hints(type(config))
    known = {field.name for field in dataclasses.fields(config)}
    for name in settings:
        if name not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"data.image_choices: {name!r} is not a setting of this model's images; known: {names}")
    values = {
        name: config_tree.from_dict(hints[name], value, f"data.image_choices.{name}")
        for name, value in settings.items()
    }
    return dataclasses.replace(config, **values)


# their reading takes longer than the example's picture
_hints = functools.cache(typing.get_type_hints)


def with_choice(example: Parsed, choices: Sequence[ImageChoice], rng: np.random.Generator) -> Parsed:
    """Return the example with the image settings of one of the choices, drawn by their weights."""
    weights = np.asarray([choice.weight for choice in choices])
    choice = choices[int(rng.choice(len(choices), p=weights / weights.sum()))]
    return dataclasses.replace(example, image_choice=tuple(settings_of(choice).items()))
