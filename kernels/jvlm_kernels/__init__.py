"""Kernels for packed sequences: arrays in, arrays out.

The import name is ``jvlm_kernels`` because the PyPI package ``kernels`` is probed for by transformers.
"""

from jvlm_kernels.attention.api import RESIDUAL_NAMES, implementations, segment_attention, segment_attention_gradients
from jvlm_kernels.attention.reference import reference_attention
from jvlm_kernels.cross_entropy.api import (
    CrossEntropy,
    CrossEntropySum,
    linear_cross_entropy,
    linear_cross_entropy_sum,
)
from jvlm_kernels.decode.api import (
    cached_attention,
    chunk_attention,
    decode_attention,
    decode_implementations,
    extend_cache,
    init_cache,
    init_pages,
    read_pages,
    write_pages,
)
from jvlm_kernels.errors import Unavailable
from jvlm_kernels.grouped.api import grouped_matmul

__all__ = [
    "RESIDUAL_NAMES",
    "CrossEntropy",
    "CrossEntropySum",
    "Unavailable",
    "cached_attention",
    "chunk_attention",
    "decode_attention",
    "decode_implementations",
    "extend_cache",
    "grouped_matmul",
    "implementations",
    "init_cache",
    "init_pages",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "read_pages",
    "reference_attention",
    "segment_attention",
    "segment_attention_gradients",
    "write_pages",
]
