"""Small experiments of every architecture, and batches for them, for tests that split them over devices."""

from __future__ import annotations

import dataclasses

import numpy as np

from jvlm.data.pipeline import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.layers import Numerics
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, OptimizerConfig

ROWS, TOKENS, PATCHES = 8, 128, 256


def qwen2_5_vl() -> VLMConfig:
    """Windows of 16 patches; heads for 8 devices, key heads for 2."""
    return VLMConfig(
        architecture="qwen2_5_vl",
        encoder=QwenViTConfig(
            depth=2,
            hidden_size=64,
            num_heads=8,
            intermediate_size=64,
            patch_size=4,
            temporal_patch_size=1,
            window_size=16,
            fullatt_block_indexes=(1,),
        ),
        connector=PatchMergerConfig(),
        decoder=TransformerConfig(
            vocab_size=160,
            hidden_size=64,
            num_layers=2,
            num_heads=8,
            num_kv_heads=2,
            intermediate_size=96,
            mrope_section=(2, 1, 1),
        ),
        image_token_id=150,
        video_token_id=151,
        numerics=Numerics(compute_dtype="float32", initializer_range=None),
    )


def experts(capacity_factor: float | None = None) -> VLMConfig:
    """As `qwen2_5_vl`, with experts in every second layer."""
    model = qwen2_5_vl()
    mlp = MoEConfig(experts=8, intermediate_size=32, capacity_factor=capacity_factor)
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, mlp=mlp))


ARCHITECTURES = {"qwen2_5_vl": qwen2_5_vl, "experts": experts}


def experiment(architecture: str, parallel: ParallelConfig = ParallelConfig(), **changes) -> Experiment:
    """One step of it; the gradient is never clipped, so that Adam's first moment tells it."""
    return Experiment(
        name="parallel",
        model=ARCHITECTURES[architecture](),
        tokenizer="none",
        processor=ProcessorConfig(),
        data=DataConfig(rows=ROWS, row_tokens=TOKENS, row_patches=PATCHES),
        parallel=parallel,
        optimizer=OptimizerConfig(clip=1e9),
        steps=10,
        **changes,
    )


def batch(config: VLMConfig, seed: int = 0) -> PackedBatch:
    """Rows of several conversations and padding: one of text alone, one full of pictures, one a long picture."""
    rng = np.random.default_rng(seed)
    B, S, P, group = ROWS, TOKENS, PATCHES, config.connector.merge**2
    arrays = {name: np.zeros((B, S), np.int32) for name in ("tokens", "segment_ids")}
    arrays["vision_index"] = np.full((B, S), -1, np.int32)
    arrays["positions"] = rng.integers(0, 50, (B, S, 3)).astype(np.int32)
    frames, windows = np.zeros((B, P), np.int32), np.zeros((B, P), np.int32)
    for row in range(B):
        cuts = np.sort(rng.choice(np.arange(8, S - 8), 3 if row != 2 else 0, replace=False))
        arrays["segment_ids"][row, : S - 6] = (np.arange(S - 6)[:, None] >= cuts).sum(1) + 1
        arrays["tokens"][row, : S - 6] = rng.integers(0, 140, S - 6)
        features = (0, P // group - 2, 40)[min(row, 2)]
        places = np.sort(rng.choice(S - 6, features, replace=False))
        # not in order: as windows have it
        arrays["vision_index"][row, places] = rng.permutation(features)
        arrays["tokens"][row, places] = config.image_token_id
        used = features * group
        frames[row, :used] = 1 if row == 2 else np.arange(used) // 48 + 1
        windows[row, :used] = np.arange(used) // 16 + 1
    values = config.encoder.patch_values
    return PackedBatch(
        loss_weights=rng.choice([0.0, 0.5, 1.0], (B, S)).astype(np.float32),
        patches=rng.integers(0, 256, (B, P, values)).astype(np.uint8),
        patch_segment_ids=frames,
        patch_window_ids=windows,
        patch_positions=rng.integers(0, 9, (B, P, 2)).astype(np.int32),
        **arrays,
    )
