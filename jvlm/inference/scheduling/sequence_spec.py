"""What the scheduler is told of a request, and the hashes of its pictures."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from jvlm.data.packing import Example


@dataclasses.dataclass(frozen=True)
class Media:
    """An image or video of a prompt.

    Attributes:
      content: hash of all that its features depend on.
      first: its first vision token, in the prompt's numbering (`Example.vision_index`).
      tokens: number of its vision tokens.
      first_patch, patches: its patches.
    """

    content: bytes
    first: int
    tokens: int
    first_patch: int
    patches: int


@dataclasses.dataclass(frozen=True)
class SequenceSpec:
    """A request, as far as it matters for scheduling.

    Attributes:
      request_id: its name; two requests of the same name cannot be there at once.
      tokens: prompt, int32 [s].
      positions: rotary positions of the whole prompt, int32 [s, 3].
      vision_index: which of the prompt's vision tokens feeds each token, int32 [s]; -1 for text.
      media: in the order of their vision tokens.
      max_tokens: most answer tokens.
      n: answers, all of one prefill.
      priority: lower goes first.
      key: whose request it is; keys take turns.
      adapter: hash of the adapter's tensors; empty for none. Part of the key of pages.
      encoder_adapter: the same, where the adapter changes the vision tower. Part of the key of features.
      salt: requests with different salts share neither pages nor features.
      whole_prompt: compute every token of the prompt, whatever is in the cache: its scores are wanted.
      needs_last_token: no step before the last token was read: the answer is under a grammar.
      draft_tokens: most tokens that are guessed and verified in one step; 0 for none.
    """

    request_id: str
    tokens: np.ndarray
    positions: np.ndarray
    vision_index: np.ndarray
    media: tuple[Media, ...] = ()
    max_tokens: int = 256
    n: int = 1
    priority: int = 0
    key: str = ""
    adapter: bytes = b""
    encoder_adapter: bytes = b""
    salt: str = ""
    whole_prompt: bool = False
    needs_last_token: bool = False
    draft_tokens: int = 0

    @classmethod
    def of(cls, request_id: str, example: Example, **fields: Any) -> SequenceSpec:
        """Return the spec of a prompt; ``fields`` are the others."""
        return cls(
            request_id=request_id,
            tokens=np.asarray(example.tokens, np.int32),
            positions=np.asarray(example.positions, np.int32),
            vision_index=np.asarray(example.vision_index, np.int32),
            media=media_of(example),
            **fields,
        )


def media_of(example: Example) -> tuple[Media, ...]:
    """Return the images and videos of a prompt.

    The hash of each is over what its features are a function of: the patches after all preprocessing, where each
    lies, and the segments and windows in which they attend. Pixels, sizes, modes and limits that lead to the same
    input of the encoder share features, and no others do.
    """
    media, fed = [], example.vision_index >= 0
    for number in range(1, int(example.media.max(initial=0)) + 1):
        index = example.vision_index[fed & (example.media == number)]
        if not index.size:
            continue
        # all vision tokens of its images: a decoder that reads them beside the text has one placeholder for many
        of_images = example.vision_segment_ids
        first = int(np.searchsorted(of_images, of_images[index.min()], "left"))
        tokens = int(np.searchsorted(of_images, of_images[index.max()], "right")) - first
        segments = of_images[first : first + tokens]
        begin = int(np.searchsorted(example.patch_segment_ids, segments[0], "left"))
        end = int(np.searchsorted(example.patch_segment_ids, segments[-1], "right"))
        span = slice(begin, end)
        content = _hash(
            example.patches[span],
            example.patch_positions[span],
            example.patch_segment_ids[span] - segments[0],
            example.patch_window_ids[span] - example.patch_window_ids[begin],
            segments - segments[0],
        )
        media.append(Media(content, first, tokens, begin, end - begin))
    return tuple(media)


def _hash(*arrays: np.ndarray) -> bytes:
    """Return SHA-256 over the types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(array.data if array.size else b"")
    return digest.digest()
