"""What decides the answers of a batch file: model, processor and sampling, as plain values with a short hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jvlm import config as config_tree
from jvlm.data.processor import Processor
from jvlm.inference.engine import Engine
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.weights.fingerprints import mixed_sum

_DIGITS = 16
# Values of a parameter in the hash of a model: all of billions would be read for minutes on a CPU.
SAMPLED = 2**20


def answer_settings(model: VLM, engine: Engine, sampling: SamplingConfig) -> dict[str, dict[str, Any]]:
    """Everything but its example that decides an answer, as values of JSON; long ones as a hash.

    The batch size and the devices are not among them: they change an answer by rounding at most.
    """
    config = config_tree.to_dict(model.config)
    precision = config.pop("precision")
    processor = engine.processor
    return json.loads(
        json.dumps(
            {
                "model": {
                    "weights": weights_hash(model),
                    "param_dtype": precision["param_dtype"],
                    "compute_dtype": precision["compute_dtype"],
                    "config": config,
                },
                "processor": _processor(processor),
                "sampling": {
                    **dataclasses.asdict(sampling),
                    "stop_token_ids": sorted(engine.stop_tokens(sampling)),
                    "banned_tokens": [_flags(engine.banned), _flags(engine.banned_first)],
                },
            },
            default=str,
        )
    )


def settings_hash(settings: dict[str, Any]) -> str:
    """A short name for settings: equal for equal ones."""
    return _hash(json.dumps(settings, sort_keys=True).encode())


def weights_hash(model: VLM, most: int = SAMPLED) -> str:
    """A hash of every parameter's name and shape and of ``most`` of its values, evenly spread.

    They are read where they are. The sums are of integers, so that devices and the order of adding do not matter.
    """
    values = {path: variable.get_value() for path, variable in sorted(vlm.variables(model).items())}
    sums = _checksums(list(values.values()), most)
    lines = [f"{path} {v.dtype} {v.shape} {int(s)}\n" for (path, v), s in zip(values.items(), sums, strict=True)]
    return _hash("".join(lines).encode())


@functools.partial(jax.jit, static_argnums=1)
def _checksums(values: list[jax.Array], most: int) -> list[jax.Array]:
    return [mixed_sum(_sample(value, most)) for value in values]


def _sample(value: jax.Array, most: int) -> jax.Array:
    """Every n-th value of each axis, so that few enough are left."""
    steps = [1] * value.ndim
    left = list(value.shape)
    while math.prod(left) > most:
        axis = left.index(max(left))
        steps[axis] *= 2
        left[axis] = -(-value.shape[axis] // steps[axis])
    return value[tuple(slice(None, None, step) for step in steps)]


def _flags(flags: np.ndarray | None) -> str | None:
    return None if flags is None else _hash(np.flatnonzero(flags).tobytes())


def _processor(processor: Processor) -> dict[str, Any]:
    values = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    lasting = {name: value for name, value in values.items() if name not in ("padding", "truncation")}
    return {
        **processor.settings(),
        "tokenizer": _hash(json.dumps(lasting).encode()),
        "chat_template": _hash(json.dumps(processor.template.templates, sort_keys=True).encode()),
    }


def files_hash(files: Sequence[str]) -> str:
    """A hash of what files hold, in their order, whatever their names."""
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return _hash(" ".join(digests).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
