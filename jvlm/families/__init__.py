"""Model families: one folder and one `Family` record each, with everything that is particular to an architecture.

Code outside this folder asks for a family by the name in `VLMConfig.family` or by a ``model_type`` of Hugging Face, and
never imports one. A family of another package is found by its entry point; see docs/adding-a-model.md.
"""

from jvlm.families.adapters import AdapterTargets
from jvlm.families.base import Family, HFFormat
from jvlm.families.gguf import GGUFFormat, GGUFVision
from jvlm.families.registry import (
    ENTRY_POINTS,
    for_model_type,
    get,
    image_limits,
    load_all,
    model_types,
    names,
    of_language_models,
    preset,
    presets,
)

__all__ = [
    "ENTRY_POINTS",
    "AdapterTargets",
    "Family",
    "GGUFFormat",
    "GGUFVision",
    "HFFormat",
    "for_model_type",
    "get",
    "image_limits",
    "load_all",
    "model_types",
    "names",
    "of_language_models",
    "preset",
    "presets",
]
