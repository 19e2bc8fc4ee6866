"""The MM1.5 family, arXiv 2409.20566: CLIP ViT-H/14, C-Abstractor, dense language models from 1B to 30B, and experts.

Published: encoder, tile and token counts, number of experts, choices of a token, how often a layer has them, and the
weights of the router's losses. Not published: the sizes of the language models and their vocabulary. Those here are
the shapes of open models of the same class (Llama 3.2 1B and 3B, Llama 3 8B, the first Llama's 30B with grouped
queries), with Qwen2.5's vocabulary, whose tokenizer is public. Upcycling needs experts of the dense width.
"""

from __future__ import annotations

import dataclasses

from jvlm.families.qwen import TOKEN_IDS
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import clip_vit
from jvlm.models.vlm import VLMConfig

# Patches along the side of a tile.
GRID_378, GRID_672 = 27, 48

# As apple/DFN5B-CLIP-ViT-H-14-378, the public tower of the same recipe: the last layer's output, before the final norm.
VIT_H = clip_vit(depth=32, hidden_size=1280, num_heads=16, intermediate_size=5120, patch_size=14, grid=GRID_672)


def _model(**decoder) -> VLMConfig:
    sizes = {"vocab_size": 151936, "rms_norm_eps": 1e-5, "qkv_bias": False, "rope_theta": 500000.0, **decoder}
    return VLMConfig(
        family="mm1_5",
        encoder=VIT_H,
        connector=CAbstractorConfig(grid=VIT_H.grid, class_token=VIT_H.class_token),
        decoder=TransformerConfig(**sizes),
        **TOKEN_IDS,
    )


def _with_experts(dense: VLMConfig) -> VLMConfig:
    experts = MoEConfig(intermediate_size=dense.decoder.intermediate_size)
    return dataclasses.replace(dense, decoder=dataclasses.replace(dense.decoder, mlp=experts))


_DENSE = {
    "mm1_5_1b": _model(
        hidden_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "mm1_5_3b": _model(
        hidden_size=3072,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "mm1_5_7b": _model(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336),
    "mm1_5_30b": _model(hidden_size=6656, num_layers=60, num_heads=52, num_kv_heads=4, intermediate_size=17920),
}

PRESETS: dict[str, VLMConfig] = {
    **_DENSE,
    "mm1_5_1b_moe": _with_experts(_DENSE["mm1_5_1b"]),
    "mm1_5_3b_moe": _with_experts(_DENSE["mm1_5_3b"]),
}


def at_grid(model: VLMConfig, grid: int) -> VLMConfig:
    """Return a model for tiles of ``grid`` x ``grid`` patches: 27 while pre-training, 48 after it."""
    parts = {name: dataclasses.replace(getattr(model, name), grid=grid) for name in ("encoder", "connector")}
    return dataclasses.replace(model, **parts)
