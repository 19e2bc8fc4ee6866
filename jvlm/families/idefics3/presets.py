"""Published sizes of Idefics3 and SmolVLM, from their configuration files."""

from __future__ import annotations

import dataclasses
from typing import Any

from jvlm.models import layers
from jvlm.models.connectors.pixel_shuffle import PixelShuffleConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.vlm import VLMConfig

IDEFICS3_TOKEN_IDS = {"image_token_id": 128257, "bos_token_id": 128000, "eos_token_id": 128001}
# of SmolVLM-256M, SmolVLM-500M and all of SmolVLM2
SMOLVLM_TOKEN_IDS = {"image_token_id": 49190, "bos_token_id": 1, "eos_token_id": 2}
# SigLIP-SO400M and SigLIP-B, at the sizes of their images
_LARGE_VIT, _SMALL_VIT = (
    ViTConfig(grid=27),
    ViTConfig(depth=12, hidden_size=768, num_heads=12, intermediate_size=3072, patch_size=16, grid=32),
)


def _model(
    encoder: ViTConfig, factor: int, token_ids: dict[str, int], family: str = "idefics3", **decoder: Any
) -> VLMConfig:
    same = {"rms_norm_eps": 1e-5, "qkv_bias": False}
    return VLMConfig(
        family=family,
        encoder=encoder,
        connector=PixelShuffleConfig(grid=encoder.grid, out_grid=encoder.grid // factor),
        decoder=TransformerConfig(**{**same, **decoder}),
        **token_ids,
    )


def _smol(family: str = "idefics3") -> dict[str, VLMConfig]:
    """SmolLM2's decoders; the vocabulary of the first 2.2B is smaller."""
    same = {"vocab_size": 49280, "head_dim": 64}
    small = {**same, "rope_theta": 100000.0, "max_position_embeddings": 8192}
    return {
        "256m": _model(
            _SMALL_VIT,
            4,
            SMOLVLM_TOKEN_IDS,
            family,
            **small,
            hidden_size=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            intermediate_size=1536,
        ),
        "500m": _model(
            _SMALL_VIT,
            4,
            SMOLVLM_TOKEN_IDS,
            family,
            **small,
            hidden_size=960,
            num_layers=32,
            num_heads=15,
            num_kv_heads=5,
            intermediate_size=2560,
        ),
        "2_2b": _model(
            _LARGE_VIT,
            3,
            SMOLVLM_TOKEN_IDS,
            family,
            **same,
            hidden_size=2048,
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            intermediate_size=8192,
            rope_theta=273768.0,
            max_position_embeddings=16384,
        ),
    }


def _first(config: VLMConfig) -> VLMConfig:
    decoder = dataclasses.replace(config.decoder, vocab_size=49155)
    return dataclasses.replace(config, decoder=decoder, image_token_id=49153)


PRESETS: dict[str, VLMConfig] = {
    "idefics3_8b": _model(
        ViTConfig(grid=26),
        2,
        IDEFICS3_TOKEN_IDS,
        vocab_size=128259,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        rope_theta=500000.0,
        rope_scaling=layers.RopeScaling(),
        max_position_embeddings=131072,
    ),
    **{f"smolvlm_{size}": _first(c) if size == "2_2b" else c for size, c in _smol().items()},
}
SMOLVLM2 = {f"smolvlm2_{size}": config for size, config in _smol("smolvlm").items()}
