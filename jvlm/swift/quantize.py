"""``jvlm export --quant_method``: a checkpoint whose language model is in fewer bits, calibrated on conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jvlm.errors import UserError
from jvlm.swift import checkpoint_model, saved
from jvlm.swift.checkpoint_model import Checkpoint
from jvlm.swift.export_arguments import ExportArguments

if TYPE_CHECKING:
    from jvlm.data.example_source import ExampleSource
    from jvlm.data.processor import Processor
    from jvlm.models.batch import PackedBatch

_SEQUENCES = 4  # of a calibration batch
_SEED = 0  # of the choice of conversations


def quantize(arguments: ExportArguments, checkpoint: Checkpoint, trained: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's model, with its adapter merged where it has one, in fewer bits.

    Args:
      trained: what a run trained, whose data --load_data_args takes.
      folder: to write.

    Raises:
      UserError: a method that needs data without any; data of which nothing can be used; a folder that is not empty.
    """
    from jvlm.adapters import merge as merging
    from jvlm.quantization.calibration import RoundingConfig
    from jvlm.quantization.export import export_quantized
    from jvlm.swift.columns import source_of

    config = RoundingConfig(arguments.quant_method, bits=arguments.quant_bits, group_size=arguments.group_size)
    dataset, media_root, columns = _data(arguments, trained)
    if config.needs_examples and not dataset:
        raise UserError(
            f"--quant_method {config.method} needs conversations to calibrate on: give --dataset FILE, or "
            "--load_data_args true for those that the checkpoint was trained on"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --output_dir")
    # before the model is loaded, which takes long
    source = source_of(dataset, columns) if dataset else None
    model, processor, _ = checkpoint_model.load(checkpoint, arguments.torch_dtype)
    model = model if model.adapters is None else merging.merge(model)
    examples = None
    if source is not None:
        roots = (*processor.media_roots, *([media_root] if media_root else []))
        examples = _batches(arguments, processor.replace(media_roots=roots), dataset, source)
    rounded = export_quantized(model, processor, folder, config, examples=examples, dtype=arguments.torch_dtype)
    print(f"{rounded.report()}\nwrote {folder}")


def _data(arguments: ExportArguments, trained: Checkpoint) -> tuple[tuple[str, ...], str | None, str | None]:
    """Return the files to calibrate on, the folder of their media, and new names of their columns."""
    if not arguments.load_data_args:
        return arguments.dataset, arguments.media_root, arguments.columns
    if arguments.dataset:
        raise UserError("--load_data_args true takes the data of the run: leave out --dataset")
    values = saved.read(trained.folder)
    media_root, columns = (getattr(arguments, name) or values.get(name) for name in ("media_root", "columns"))
    return tuple(values["dataset"]), media_root, columns


def _batches(
    arguments: ExportArguments, processor: Processor, dataset: tuple[str, ...], source: ExampleSource
) -> Iterator[PackedBatch]:
    """Yield packed batches of at most so many conversations, drawn from all; say how many could not be used, and why.

    Raises:
      UserError: none could be used.
    """
    from jvlm.data.config import DataConfig
    from jvlm.data.errors import grouped
    from jvlm.data.subset import Subset
    from jvlm.training.validation_data import ValidationData

    count = min(arguments.quant_n_samples, len(source))
    drawn = np.sort(np.random.default_rng(_SEED).permutation(len(source))[:count])
    tokens = arguments.max_length
    data = DataConfig(train=dataset, batch_size=_SEQUENCES, seq_len=tokens, max_patches=4 * tokens)
    used, rejected = 0, []
    for packed in ValidationData(processor, data, Subset(source, drawn)):
        used += packed.conversations
        rejected += packed.rejected
        if packed.conversations:
            yield packed.batch
    left_out = f"; {len(rejected)} could not be used:\n{grouped(rejected)}" if rejected else ""
    if not used:
        raise UserError(f"none of {count} conversations of {', '.join(dataset)} can be calibrated on{left_out}")
    print(f"calibrated on {used} conversations of {len(source)}{left_out}")
