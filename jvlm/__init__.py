"""jvlm: train, evaluate, serve and export vision-language models in JAX.

The public surface is loaded on first use, so that ``import jvlm`` starts no device and imports nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_PUBLIC = {
    "PackedBatch": "jvlm.models.batch",
    "Processor": "jvlm.data.processor",
    "VLM": "jvlm.models.vlm",
    "generate": "jvlm.inference.generate",
    "load": "jvlm.weights.io",
    "save": "jvlm.weights.io",
}

__all__ = ["PackedBatch", "Processor", "VLM", "__version__", "generate", "load", "save"]  # noqa: RUF022

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.inference.generate import generate
    from jvlm.models.batch import PackedBatch
    from jvlm.models.vlm import VLM
    from jvlm.weights.io import load, save


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jvlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
