"""LoRA on the demo's model: where is the white cell in a microscope photo? `make demo-finetune`."""

from pathlib import Path

from jvlm.adapters.config import AdapterConfig
from jvlm.data.config import DataConfig
from jvlm.training.config import CheckpointConfig, EvaluationConfig, Experiment
from jvlm.training.optimizer.config import OptimizerConfig

DATA = Path(__file__).parent / "white_cells_data"


def get_config() -> Experiment:
    """Start from the demo's run; photos are as small as its images, and three of them fill a sequence."""
    return Experiment(
        name="white_cells",
        init_from="runs/easy_vqa/hf",
        adapter=AdapterConfig(rank=16, alpha=32.0, targets=("all-linear",)),
        data=DataConfig(train=(str(DATA / "train.arrayrecord"),), batch_size=8, seq_len=160, max_patches=192),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.05, weight_decay=0.01, beta2=0.99),
        checkpoint=CheckpointConfig(save_interval_steps=200),
        evaluation=EvaluationConfig(
            data=(str(DATA / "test.arrayrecord"),),
            max_new_tokens=48,
            batch_size=85,
            before_training=True,
            aim_iou=0.75,
        ),
        steps=500,
        log_interval_steps=50,
    )
