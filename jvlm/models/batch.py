"""What models take and return: the packed batch as a pytree, a step of decoding, a decoder's output.

Axes: B packed sequences, S tokens of a sequence, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jvlm.models.packed_batch import PackedBatch

__all__ = ["DecodeStep", "DecoderOutput", "PackedBatch", "axes"]

jax.tree_util.register_dataclass(PackedBatch)


def axes(field: str) -> tuple[str, str]:
    """Return the logical axes of the first two dimensions of a field of `PackedBatch`; the others are never split."""
    return ("batch", "patches" if field.startswith("patch") else "sequence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One new token for each sequence: it is written at ``cache_index`` and attends to itself and what is before it."""

    cache_index: Int[Array, " B"]


class DecoderOutput(NamedTuple):
    """What a pass through a decoder returns.

    Attributes:
      hidden: hidden states after the last norm.
      cache: what later tokens need of these, such as the keys and values of every layer.
      aux: what layers report (balance losses, router statistics), by name: one entry for each layer that reports it.
        "loss" is added to the training loss.
    """

    hidden: Float[Array, "B S D"]
    cache: Any
    aux: dict[str, Array]
