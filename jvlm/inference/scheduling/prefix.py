"""Keys of pages: a hash of everything that the keys and values in a page depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jvlm.inference.scheduling.sequence_spec import Media, SequenceSpec


def root_key(spec: SequenceSpec) -> bytes:
    """Return the key before the first page: the adapters and the salt."""
    digest = hashlib.sha256(b"jvlm prefix")
    for part in (spec.adapter, spec.encoder_adapter, spec.salt.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def page_key(
    parent: bytes,
    tokens: Int[np.ndarray, " T"],
    positions: Int[np.ndarray, "T a"],
    vision_index: Int[np.ndarray, " T"],
    media: Sequence[Media],
) -> bytes:
    """Return the key of a page: SHA-256 over the page before, and what stands in this one.

    A picture counts by its content, and by which of its vision tokens feeds which token; rotary positions count
    because two videos of the same frames and another rate differ in nothing else.

    Args:
      tokens: of the page, int32 [T].
      positions: int32 [T, 3].
      vision_index: int32 [T], in the prompt's numbering; -1 for text.
      media: of the prompt.
    """
    digest = hashlib.sha256(parent)
    digest.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    digest.update(np.ascontiguousarray(positions, np.int32).tobytes())
    fed = vision_index >= 0
    if fed.any():
        for item in media:
            here = fed & (vision_index >= item.first) & (vision_index < item.first + item.tokens)
            if here.any():
                digest.update(item.content)
                digest.update(np.where(here, vision_index - item.first, -1).astype(np.int32).tobytes())
    return digest.digest()


def prompt_keys(spec: SequenceSpec, page_size: int) -> list[bytes]:
    """Return the keys of all whole pages of a prompt."""
    keys, parent = [], root_key(spec)
    for start in range(0, len(spec.tokens) - page_size + 1, page_size):
        span = slice(start, start + page_size)
        index = spec.vision_index[span]
        parent = page_key(parent, spec.tokens[span], spec.positions[span], index, spec.media)
        keys.append(parent)
    return keys
