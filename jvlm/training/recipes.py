"""Fine-tuning recipes of the shipped configs: what LoRA, QLoRA, DoRA and full training have in common over models."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm import families
from jvlm.adapters.config import AdapterConfig
from jvlm.data.config import DataConfig
from jvlm.models.layers import Precision
from jvlm.parallel.mesh import ParallelConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.training.config import CheckpointConfig, Experiment, ExportConfig, OptimizerConfig

Recipe = Literal["lora", "qlora", "dora", "full"]


def finetune(preset: str, recipe: Recipe, folder: str, topologies: tuple[str, ...], **changes) -> Experiment:
    """Return an experiment that fine-tunes a published model on conversations; 16 sequences of 2,048 tokens a step.

    "lora" puts adapters on all linear maps of the language model; "qlora" does so on its matrices in NF4; "dora" learns
    their lengths too. "full" trains the language model and the connector, in float32, four sequences at a time. The
    vision tower is frozen.

    Args:
      preset: name of the model in its family.
      folder: of its weights.
      topologies: chips that it was planned for and fits (docs/results/finetune_memory.md).
      changes: fields of the experiment.
    """
    full = recipe == "full"
    adapter = AdapterConfig(dropout=0.05, targets=("decoder",), use_dora=recipe == "dora")
    precision = Precision(param_dtype="float32" if full else "bfloat16", remat="full")
    experiment = Experiment(
        name=f"{preset}_{recipe}",
        topologies=topologies,
        model=dataclasses.replace(families.preset(preset), precision=precision),
        init_from=folder,
        adapter=None if full else adapter,
        quantize=QuantizationConfig() if recipe == "qlora" else None,
        data=DataConfig(batch_size=4 if full else 1, seq_len=2048, max_patches=4096, on_too_long="shrink"),
        optimizer=OptimizerConfig(
            learning_rate=1e-5 if full else 1e-4, encoder_lr=0.0 if full else None, warmup_ratio=0.05
        ),
        parallel=ParallelConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_steps=200),
        export=ExportConfig(enabled=full),
        epochs=1.0,
        gradient_accumulation_steps=4 if full else 16,
    )
    return dataclasses.replace(experiment, **changes)
