"""What llama.cpp calls a family's models in GGUF files.

Names and keys are those of llama.cpp's converters (github.com/ggml-org/llama.cpp, conversion/ and
gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

# The expressions in tokenizer.json by which tokenizers split text before their merges. llama.cpp has code for each, and
# knows it by a name (src/llama-vocab.cpp, "tokenizer_pre").
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = {_CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}
LLAMA3 = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe"}


class DecoderLayers(NamedTuple):
    """What the layers of a decoder have; fields as in `TransformerConfig`."""

    qkv_bias: bool = False
    qk_norm: bool = False
    mrope: str = "none"
    experts: bool = False


# What llama.cpp computes for each of its architectures.
ARCHITECTURES = {
    "llama": DecoderLayers(),
    "qwen2": DecoderLayers(qkv_bias=True),
    "qwen3": DecoderLayers(qk_norm=True),
    "qwen2vl": DecoderLayers(qkv_bias=True, mrope="in sections"),
    "qwen3vl": DecoderLayers(qk_norm=True, mrope="interleaved"),
    "qwen3vlmoe": DecoderLayers(qk_norm=True, mrope="interleaved", experts=True),
}


@dataclasses.dataclass(frozen=True)
class GGUFVision:
    """llama.cpp's form of a vision tower and its connector, the file that it calls mmproj.

    Attributes:
      add_keys: adds the keys to a `gguf.GGUFWriter`. Raises UserError for a tower that llama.cpp computes otherwise.
      tensors: yields the GGUF tensors made of a tensor in the family's checkpoints, given its name and the model's
        configuration: a name, and the function that takes the one from the other. Nothing for tensors of the language
        model.
    """

    add_keys: Callable[[Any, VLMConfig], None]
    tensors: Callable[[str, VLMConfig], Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]]


@dataclasses.dataclass(frozen=True)
class GGUFFormat:
    """llama.cpp's form of a family's models.

    Attributes:
      architecture: llama.cpp's name of the language model.
      pre_tokenizers: expressions by which the family's tokenizers split text, each with llama.cpp's name of it.
      vision: the vision tower and connector; None where llama.cpp has no form of them.
      add_keys: adds keys of the language model that only this family has to a `gguf.GGUFWriter`; None adds none.
    """

    architecture: Callable[[VLMConfig], str]
    pre_tokenizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vision: GGUFVision | None = None
    add_keys: Callable[[Any, VLMConfig], None] | None = None


def language_model(config: VLMConfig) -> str:
    """Return llama.cpp's name of a language model that was published by itself, by what its layers have."""
    if config.decoder.qk_norm:
        return "qwen3"
    return "qwen2" if config.decoder.qkv_bias else "llama"
