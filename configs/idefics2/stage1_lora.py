"""Idefics2's first stage as published: SigLIP and Mistral stand still under LoRA, what is new is trained whole.

    jvlm train idefics2/stage1_lora --encoder_from SIGLIP --decoder_from MISTRAL --data.train pages.jsonl

Its adapters merged (`jvlm.adapters.merge`), the model is what idefics2/stage2_lora starts from.

Images of up to 384 pixels, 64 tokens each. The paper (arXiv 2405.02246) says which parts are trained and how fast.
Its runs' own settings are not published; rank, alpha, dropout, start, schedule and the list of what has no weight decay
are those of the authors' later runs (huggingface/smollm, vision/m4, tr_341 to tr_350). There the output matrix has an
adapter too; here the rows of the three new tokens are trained instead, in embedding and head.
"""

import dataclasses

from jvlm import configs
from jvlm.adapters.config import AdapterConfig
from jvlm.training.config import Experiment, OptimizerConfig

# Beside the connector: the encoder's embeddings and the norms of both towers.
WHOLE = (
    *("connector", "patch_embed", "position_embedding"),
    *("layer_norm1", "layer_norm2", "post_layernorm", "input_layernorm", "post_attention_layernorm", "norm"),
)
ADAPTER = AdapterConfig(
    rank=64,
    alpha=16.0,
    dropout=0.1,
    init="gaussian",
    targets=("encoder.attention", "encoder.mlp", "decoder.attention", "decoder.mlp"),
    train_modules=WHOLE,
    train_tokens=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4,
    schedule="linear",
    warmup_steps=2000,
    weight_decay=0.1,
    no_decay=("connector.latents", "connector.blocks.*"),  # the perceiver
    beta2=0.999,
)


def get_config() -> Experiment:
    """Return the data and model of idefics2/pretrain with adapters."""
    experiment = configs.load("idefics2/pretrain")
    return dataclasses.replace(
        experiment,
        name="idefics2_stage1_lora",
        topologies=(),
        encoder_from="siglip-so400m-patch14-384",
        decoder_from="Mistral-7B-v0.1",
        adapter=ADAPTER,
        optimizer=OPTIMIZER,
    )
