"""Small experiments of every architecture, and batches for them, for tests that split them over devices."""

from __future__ import annotations

import dataclasses

import numpy as np

from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.qwen2_vl.vision import Qwen2ViTConfig
from jvlm.families.qwen3_vl.vision import DeepStackMergerConfig, Qwen3ViTConfig
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.connectors.pixel_shuffle import PixelShuffleConfig
from jvlm.models.connectors.pooled_mlp import ImageGridConfig
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment, OptimizerConfig

SEQUENCES, TOKENS = 8, 128
# patches of a sequence; places of a frame in these batches, and its features
PATCHES = {"qwen2_5_vl": 256, "qwen2_vl": 256, "qwen3_vl": 256, "idefics2": 256, "idefics3": 16 * 8, "mm1_5": 17 * 8}
FRAMES = {
    "qwen2_5_vl": (48, 12),
    "qwen2_vl": (48, 12),
    "qwen3_vl": (48, 12),
    "idefics2": (48, 4),
    "idefics3": (16, 4),
    "mm1_5": (17, 4),
}
# each axis alone, then together; "one" is what the others are compared with
MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "expert": {"expert": 4},
    "data context": {"data": 2, "context": 4},
    "data context, ring": {"data": 2, "context": 4, "ring_attention": True},
    "data fsdp tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp context tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "expert context tensor": {"expert": 2, "context": 2, "tensor": 2},
}


PRECISION = Precision(compute_dtype="float32", initializer_range=None)
_DECODER = TransformerConfig(
    vocab_size=160,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    intermediate_size=96,
    mrope_section=(2, 1, 1),
)


def qwen2_5_vl() -> VLMConfig:
    """Windows of 16 patches; heads for 8 devices, key heads for 2."""
    return VLMConfig(
        family="qwen2_5_vl",
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
        decoder=_DECODER,
        image_token_id=150,
        video_token_id=151,
        precision=PRECISION,
    )


def qwen2_vl() -> VLMConfig:
    """Attention to whole images, and LayerNorms."""
    encoder = Qwen2ViTConfig(
        depth=2, hidden_size=64, num_heads=8, intermediate_size=128, patch_size=4, temporal_patch_size=1
    )
    return dataclasses.replace(
        qwen2_5_vl(), family="qwen2_vl", encoder=encoder, connector=PatchMergerConfig(norm="layer")
    )


def qwen3_vl() -> VLMConfig:
    """Two DeepStack levels, which enter both layers of the decoder; experts in each."""
    encoder = Qwen3ViTConfig(
        depth=3,
        hidden_size=64,
        num_heads=8,
        intermediate_size=64,
        patch_size=4,
        temporal_patch_size=1,
        position_grid=5,
        deepstack_layers=(0, 1),
    )
    decoder = dataclasses.replace(
        _DECODER,
        qkv_bias=False,
        qk_norm=True,
        head_dim=12,
        mrope_section=(2, 2, 2),
        mrope_interleaved=True,
        mlp=MoEConfig(every=1, experts=4, intermediate_size=32),
    )
    return VLMConfig(
        family="qwen3_vl",
        encoder=encoder,
        connector=DeepStackMergerConfig(levels=2),
        decoder=decoder,
        image_token_id=150,
        video_token_id=151,
        precision=PRECISION,
    )


def idefics2() -> VLMConfig:
    """Frames of any size become 4 features."""
    return VLMConfig(
        family="idefics2",
        encoder=ViTConfig(depth=2, hidden_size=32, num_heads=8, intermediate_size=64, patch_size=4, grid=8),
        connector=PerceiverConfig(
            projection_size=48, latents=4, depth=2, num_heads=8, num_kv_heads=2, head_dim=8, norm_eps=1e-6
        ),
        decoder=dataclasses.replace(_DECODER, mrope_section=None, qkv_bias=False, sliding_window=24),
        image_token_id=150,
        precision=PRECISION,
    )


def idefics3() -> VLMConfig:
    """Tiles of 4 x 4 patches become 2 x 2 features."""
    base = idefics2()
    return dataclasses.replace(
        base,
        family="idefics3",
        encoder=dataclasses.replace(base.encoder, grid=4),
        connector=PixelShuffleConfig(grid=4, out_grid=2),
        decoder=dataclasses.replace(base.decoder, sliding_window=None),
    )


def mm1_5() -> VLMConfig:
    """Frames of 4 x 4 patches and a class token; experts in every second layer."""
    encoder = ViTConfig(
        depth=2, hidden_size=32, num_heads=8, intermediate_size=64, patch_size=4, grid=4, class_token=True
    )
    return VLMConfig(
        family="mm1_5",
        encoder=encoder,
        connector=CAbstractorConfig(grid=4, class_token=True, out_grid=2, hidden_size=32, depth=1),
        decoder=dataclasses.replace(
            _DECODER, mrope_section=None, qkv_bias=False, mlp=MoEConfig(every=2, experts=4, intermediate_size=32)
        ),
        image_token_id=150,
        precision=PRECISION,
    )


def cross_attention(attends_to: str = "last") -> VLMConfig:
    """As `idefics2`, but every second layer reads the vision tokens, instead of having them among its own."""
    config = idefics2()
    fields = {"cross_attention_every": 2, "attends_to": attends_to}
    return dataclasses.replace(config, decoder=CrossAttentionTransformerConfig.of(config.decoder, **fields))


def with_precision(config: VLMConfig, **changes) -> VLMConfig:
    """The model with other settings of `Precision`."""
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, **changes))


ARCHITECTURES = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "mm1_5": mm1_5,
}


def experiment(architecture: str, parallel: ParallelConfig = ParallelConfig(), **changes) -> Experiment:
    """One step of it; the gradient is never clipped, so that Adam's first moment tells it."""
    return Experiment(
        name="parallel",
        model=ARCHITECTURES[architecture](),
        tokenizer="none",
        processor=ProcessorConfig(),
        data=DataConfig(batch_size=SEQUENCES, seq_len=TOKENS, max_patches=PATCHES[architecture]),
        parallel=parallel,
        optimizer=OptimizerConfig(max_grad_norm=1e9),
        steps=10,
        **changes,
    )


def batch(config: VLMConfig, seed: int = 0, text_only: int = 1) -> PackedBatch:
    """Sequences of several conversations and padding: the first text alone, one full of pictures, others with some."""
    rng = np.random.default_rng(seed)
    B, S, P = SEQUENCES, TOKENS, PATCHES[config.family]
    places, per_frame = FRAMES[config.family]
    arrays = {name: np.zeros((B, S), np.int32) for name in ("tokens", "segment_ids")}
    arrays["vision_index"] = np.full((B, S), -1, np.int32)
    frames, windows = np.zeros((B, P), np.int32), np.zeros((B, P), np.int32)
    at = rng.integers(0, 4, (B, P, 2)).astype(np.int32)
    for sequence in range(B):
        cuts = np.sort(rng.choice(np.arange(8, S - 8), 3 if sequence != 2 else 0, replace=False))
        arrays["segment_ids"][sequence, : S - 6] = (np.arange(S - 6)[:, None] >= cuts).sum(1) + 1
        arrays["tokens"][sequence, : S - 6] = rng.integers(0, 140, S - 6)
        count = 0 if sequence < text_only else P // places if sequence == text_only else 2
        features = count * per_frame
        chosen = np.sort(rng.choice(S - 6, features, replace=False))
        # not in order: as windows have it
        arrays["vision_index"][sequence, chosen] = rng.permutation(features)
        arrays["tokens"][sequence, chosen] = config.image_token_id
        frames[sequence, : count * places] = np.arange(count * places) // places + 1
        windows[sequence, : count * places] = np.arange(count * places) // 16 + 1
        if config.encoder.position_values == 4:
            at = np.concatenate([at[..., :2], np.full((B, P, 2), 4, np.int32)], -1)
        if getattr(config.encoder, "class_token", False):
            at[sequence, : count * places : places] = -1
    return PackedBatch(
        loss_weights=rng.choice([0.0, 0.5, 1.0], (B, S)).astype(np.float32),
        positions=rng.integers(0, 50, (B, S, 3)).astype(np.int32),
        patches=rng.integers(0, 256, (B, P, config.encoder.patch_values)).astype(np.uint8),
        patch_segment_ids=frames,
        patch_window_ids=windows,
        patch_positions=at,
        max_image_patches=places if isinstance(config.connector, ImageGridConfig) else None,
        **arrays,
    )
