"""What models take and return: the packed batch as a pytree, steps with a cache, a decoder's output.

Axes: B packed sequences, S tokens of a sequence, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jvlm.models.packed_batch import PackedBatch

__all__ = ["CacheSizes", "DecodeStep", "DecoderOutput", "PackedBatch", "PrefillStep", "axes"]

jax.tree_util.register_dataclass(PackedBatch)


def axes(field: str) -> tuple[str, str]:
    """Return the logical axes of the first two dimensions of a field of `PackedBatch`; the others are never split."""
    return ("batch", "patches" if field.startswith("patch") else "sequence")


class CacheSizes(NamedTuple):
    """Sizes of a cache for generation.

    Attributes:
      pages: pages of keys and values, of which page 0 takes what padding writes.
      page_size: tokens of a page.
      slots: sequences that decode together.
      vision_tokens: vision tokens that a sequence may read while it decodes; 0 where the text holds them.
      dtype: of keys and values; None is the dtype that the decoder computes in.
    """

    pages: int
    page_size: int
    slots: int
    vision_tokens: int = 0
    dtype: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """New tokens of B sequences: written from ``cache_index`` on, they attend to themselves and to what is before.

    Attributes:
      cache_index: tokens of each sequence that are cached already.
      block_tables: the pages of each sequence in order.
      slots: the slot of each sequence.
    """

    cache_index: Int[Array, " B"]
    block_tables: Int[Array, "B W"]
    slots: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillStep:
    """Chunks of prompts, packed: each begins at a whole page of its row, and follows what is cached of its sequence.

    Attributes:
      pages: page that each page of the row is written to; 0 for padding.
      past_pages: pages of what is cached already of the sequences, in any order; M = 0 where nothing is.
      past_segments: the segment whose past each of their entries is; 0 for none.
      memory_index: for each slot of the row's group and each vision token that it may read while it decodes: which
        vision token of this pass it is from now on; -1 leaves the old one, -2 is none. F = 0 where there are none.
    """

    pages: Int[Array, "B N"]
    past_pages: Int[Array, "B M"]
    past_segments: Int[Array, "B P"]
    memory_index: Int[Array, "B s F"]


class DecoderOutput(NamedTuple):
    """What a pass through a decoder returns.

    Attributes:
      hidden: hidden states after the last norm.
      cache: the cache with what later tokens need of these, such as the keys and values of every layer; None in a whole
        pass.
      aux: what layers report (balance losses, router statistics), by name: one entry for each layer that reports it.
        "loss" is added to the training loss.
    """

    hidden: Float[Array, "B S D"]
    cache: Any
    aux: dict[str, Array]
