"""What the papers in miniature share: their data, the sizes of their models and sequences, and what is held out.

    from jvlm import configs
    mini = configs.module("mixtures/mini")

The data is made by `make mini-data` into the folder `mini_data`, where commands run. Another data set or other sizes
are set here, for all stages of all papers.
"""

import dataclasses
from typing import Any

from jvlm import configs
from jvlm.adapters.config import AdapterConfig
from jvlm.data.config import DataConfig
from jvlm.data.mixture.config import Mixture
from jvlm.data.processor import ProcessorConfig
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.encoders.vit import ViTConfig, clip_vit
from jvlm.models.vlm import VLMConfig
from jvlm.training.config import CheckpointConfig, EvaluationConfig, ExportConfig, OptimizerConfig, ValidationConfig

DATA = "mini_data"
TOKENIZERS = configs.FOLDER / "mini" / "tokenizers"  # of tools/mini/make_tokenizer.py
TOKENIZER, IDEFICS2_TOKENIZER = str(TOKENIZERS / "qwen"), str(TOKENIZERS / "idefics2")
PIXELS, FRAME = 64 * 64, 32 * 32  # of a picture and of a frame of a video, as they are drawn
VOCABULARY, FIRST_SPECIAL = 1024, 1010
# Kinds of data by the names of the papers, and the files that each has here.
FILES = {
    "captions": ("captions",),
    "interleaved": ("interleaved",),
    "language": ("language",),
    "text": ("text",),
    "ocr": ("ocr",),
    "grounding": ("grounding", "where", "cells"),
    "counting": ("counting",),
    "qa": ("qa",),
    "video": ("video",),
    "gui": ("gui",),
    "instruction": ("instruction",),
    "reasoning": ("reasoning",),
    "lines": ("lines",),
    "math": ("math",),
    "code": ("code",),
    "science": ("science",),
    "multi": ("multi",),
    "long_text": ("long_text",),
    "long_documents": ("long_documents",),
    "high_resolution": ("high_resolution",),
    "long_video": ("long_video",),
    "long_reasoning": ("long_reasoning",),
    "dialogue": ("dialogue",),
    "descriptions": ("descriptions",),
}
SHORT = ("qa", "ocr", "grounding", "where", "cells", "counting", "gui", "video", "text", "reasoning")
LONG = ("high_resolution", "long_documents", "long_text", "long_video", "long_reasoning")


def train(*kinds: str) -> tuple[str, ...]:
    """Return the training shards of kinds of data."""
    return tuple(f"{DATA}/train_{file}.arrayrecord" for kind in kinds for file in FILES[kind])


def test(*files: str) -> tuple[str, ...]:
    """Return shards of examples that are held out, to be asked at the end."""
    return tuple(f"{DATA}/test_{file}.arrayrecord" for file in files)


def held_out(*files: str) -> tuple[str, ...]:
    """Return shards of examples that are held out too, to choose settings by."""
    return tuple(f"{DATA}/validation_{file}.arrayrecord" for file in files)


def special(number: int) -> int:
    """Return the id of one of the tokenizer's special tokens, in the order of tools/make_easy_vqa.py."""
    return FIRST_SPECIAL + number


# the demo's model with more words and one more layer
DEMO = configs.load("mimo_vl/easy_vqa").model
DECODER = dataclasses.replace(DEMO.decoder, vocab_size=VOCABULARY, num_layers=3)
MODEL = dataclasses.replace(
    DEMO,
    decoder=DECODER,
    image_token_id=special(12),
    video_token_id=special(13),
    vision_start_token_id=special(9),
    vision_end_token_id=special(10),
    vision_pad_token_id=special(11),
    bos_token_id=special(0),
    eos_token_id=special(2),
)
# Pictures stay as they are drawn: 64 x 64 pixels are 16 tokens, 128 x 128 are 64; a pair of frames is 4.
PROCESSOR = ProcessorConfig(image=QwenImageConfig(PIXELS // 4, 4 * PIXELS, FRAME, FRAME))
# Muon learns in 100 steps at this size what AdamW learns in 300.
OPTIMIZER = OptimizerConfig(
    kind="muon", learning_rate=2e-3, warmup_ratio=0.05, min_lr_ratio=0.05, weight_decay=0.05, beta2=0.99
)
# MM1.5: tiles of 32 x 32 pixels, 4 tokens each
TILE = 4  # patches along the side of a tile
TILED_MODEL = dataclasses.replace(
    MODEL,
    family="mm1_5",
    encoder=clip_vit(depth=2, hidden_size=96, num_heads=4, intermediate_size=256, patch_size=8, grid=TILE),
    connector=CAbstractorConfig(grid=TILE, out_grid=2, hidden_size=96, depth=1),
    decoder=dataclasses.replace(DECODER, num_layers=2, mrope_section=None, qkv_bias=False),
)


def tiled(**splitting) -> ProcessorConfig:
    """Return MM1.5's processor; places are thousandths of the picture. Separators cost fewer tokens than an index."""
    return ProcessorConfig(image=TiledImageConfig(indicator="separator", num_frames=4, **splitting), box_format="mm1_5")


# Idefics2: pictures of up to 64 pixels a side, 4 latents each
GRID, LATENTS = 8, 4
IDEFICS2_MODEL = VLMConfig(
    family="idefics2",
    encoder=ViTConfig(depth=2, hidden_size=96, num_heads=4, intermediate_size=256, patch_size=8, grid=GRID),
    connector=PerceiverConfig(
        projection_size=DECODER.intermediate_size,  # Hugging Face's config.json has one width for both
        latents=LATENTS,
        depth=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        min_image_patches=16,
    ),
    decoder=dataclasses.replace(DECODER, num_layers=3, mrope_section=None, qkv_bias=False),
    image_token_id=special(4),
    bos_token_id=special(1),
    eos_token_id=special(2),
    precision=MODEL.precision,
)

# Idefics2's adapters; rank 16 at a width of 128 is a larger share of it than the paper's 64 of 4,096.
IDEFICS2_ADAPTER = AdapterConfig(
    rank=16,
    alpha=16.0,
    init="gaussian",
    targets=("encoder.attention", "encoder.mlp", "decoder.attention", "decoder.mlp"),
    train_modules=("connector",),
)
ADAPTER_RATE = 4e-3


def crops(longest: int, *, split: bool = False) -> ProcessorConfig:
    """Return Idefics2's processor for pictures of up to so many pixels a side."""
    return ProcessorConfig(image=Idefics2ImageConfig(longest_edge=longest, shortest_edge=32, split=split))


EXPORT = ExportConfig(enabled=False)
CHECKPOINT = CheckpointConfig(save_interval_steps=50)  # half a minute that a kill costs at most


def data(
    mixture: Mixture, *, seq_len: int = 160, batch_size: int = 8, max_patches: int = 192, **more: Any
) -> DataConfig:
    """Return packed sequences of a mixture: three pictures each, as in the demo."""
    sizes = {"seq_len": seq_len, "batch_size": batch_size, "max_patches": max_patches}
    return DataConfig(mixture=mixture, pack_window=512, **sizes, **more)


def evaluation(*files: str) -> EvaluationConfig:
    """Return the questions that every stage is asked, each alone."""
    return EvaluationConfig(data=test(*files), max_new_tokens=64, batch_size=128)


def validation(*files: str) -> ValidationConfig:
    """Return the held-out loss of each file, measured at the end."""
    return ValidationConfig(data=held_out(*files), interval_steps=1_000_000)


def optimizer(**changes) -> OptimizerConfig:
    """Return the optimizer of all stages, changed."""
    return dataclasses.replace(OPTIMIZER, **changes)
