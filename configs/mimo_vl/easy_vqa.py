"""The demo: a MiMo-VL of about a million parameters learns easy-VQA, with boxes, on two CPU cores."""

import dataclasses
from pathlib import Path

from jvlm.data.config import DataConfig
from jvlm.data.processor import ProcessorConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.training.config import CheckpointConfig, EvaluationConfig, Experiment, OptimizerConfig, Stage

DATA = Path(__file__).parent / "easy_vqa_data"
PIXELS = 64 * 64


def get_config() -> Experiment:
    """Images of 64 x 64 are 8 x 8 patches, 16 tokens; three of them, with a question or two each, fill a sequence."""
    model = VLMConfig(
        family="qwen2_5_vl",
        encoder=QwenViTConfig(
            depth=2,
            hidden_size=96,
            num_heads=4,
            intermediate_size=256,
            patch_size=8,
            temporal_patch_size=2,
            window_size=64,
            fullatt_block_indexes=(1,),
        ),
        connector=PatchMergerConfig(),
        decoder=TransformerConfig(
            vocab_size=544,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=384,
            # rows and columns of a 4 x 4 grid must differ in angle: the high frequencies are theirs
            rope_theta=500.0,
            mrope_section=(1, 3, 28),
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        ),
        image_token_id=542,
        video_token_id=543,
        vision_start_token_id=539,
        vision_end_token_id=540,
        vision_pad_token_id=541,
        bos_token_id=530,
        eos_token_id=532,
        precision=Precision(compute_dtype="float32", initializer_range=None),
    )
    # Muon learns in 100 steps here what AdamW learns in 300.
    optimizer = OptimizerConfig(
        kind="muon", learning_rate=2e-3, warmup_ratio=0.05, min_lr_ratio=0.0, weight_decay=0.05, beta2=0.99
    )

    def data(name: str) -> DataConfig:
        return DataConfig(
            train=(str(DATA / f"{name}.arrayrecord"),), batch_size=8, seq_len=160, max_patches=192, pack_window=512
        )

    # Where a shape lies, and whether it is a circle, a rectangle or a triangle, is learned in a minute each where
    # little else is asked, and not in all of the time where everything is.
    where = dataclasses.replace(optimizer, learning_rate=3e-3, min_lr_ratio=0.3)
    shapes = dataclasses.replace(optimizer, learning_rate=2.5e-3, min_lr_ratio=0.7)
    return Experiment(
        name="easy_vqa",
        stages=(Stage("where", data("where"), where, steps=300), Stage("shapes", data("shapes"), shapes, steps=400)),
        model=model,
        tokenizer=str(DATA / "tokenizer"),
        processor=ProcessorConfig(image=QwenImageConfig(PIXELS, PIXELS, PIXELS, PIXELS)),
        data=data("questions"),
        optimizer=optimizer,
        checkpoint=CheckpointConfig(save_interval_steps=250),
        evaluation=EvaluationConfig(
            data=(str(DATA / "test.arrayrecord"),),
            max_new_tokens=40,
            batch_size=128,
            text_only_baseline=True,
            aim=92.0,
            aim_iou=0.8,
        ),
        steps=950,
        log_interval_steps=50,
    )
