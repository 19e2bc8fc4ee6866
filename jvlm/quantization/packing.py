"""Signed 4-bit and 8-bit codes in int32 words, as compressed-tensors' "pack-quantized" has them.

Axes: o outputs, i inputs, w words.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int8, Int32


def packed(codes: Int[np.ndarray, "o i"], bits: int = 4) -> Int32[np.ndarray, "o w"]:
    """Return codes from -2^(bits - 1) on, in words along the inputs: offset to be positive, the first lowest."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    positive = (padded.astype(np.int32) + (1 << (bits - 1))).astype(np.uint32)
    if padded.shape[1] > codes.shape[1]:
        positive[:, codes.shape[1] :] = 0
    words = np.zeros((len(codes), padded.shape[1] // per_word), np.uint32)
    for digit in range(per_word):
        words |= positive[:, digit::per_word] << np.uint32(bits * digit)
    return words.view(np.int32)


def unpacked(words: Int32[np.ndarray, "o w"], shape: tuple[int, ...], bits: int = 4) -> Int8[np.ndarray, "o i"]:
    """Return the codes again that `packed` took, of a matrix of this shape."""
    per_word, unsigned = 32 // bits, words.view(np.uint32)
    codes = np.empty((len(words), words.shape[1] * per_word), np.int8)
    for digit in range(per_word):
        nibble = (unsigned >> np.uint32(bits * digit)) & np.uint32((1 << bits) - 1)
        codes[:, digit::per_word] = nibble.astype(np.int32) - (1 << (bits - 1))
    return codes[:, : shape[1]]
