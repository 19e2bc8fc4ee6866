"""Attention kernels for packed sequences: arrays in, arrays out.

The import name is ``jvlm_kernels`` because the PyPI package ``kernels`` is probed for by transformers.
"""

from jvlm_kernels.attention.api import Unavailable, implementations, segment_attention
from jvlm_kernels.attention.decode import cached_attention, open_cache
from jvlm_kernels.attention.reference import reference_attention

__all__ = [
    "Unavailable",
    "cached_attention",
    "implementations",
    "open_cache",
    "reference_attention",
    "segment_attention",
]
