"""``jvlm export`` and ``jvlm merge-lora``: what becomes of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jvlm.errors import UserError
from jvlm.swift import checkpoint_model
from jvlm.swift.checkpoint_model import Checkpoint
from jvlm.swift.export_arguments import ExportArguments, MergeArguments

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.models.batch import PackedBatch

_SEQUENCES = 4  # of a calibration batch


def merge(arguments: MergeArguments) -> Path:
    """Merge a checkpoint's adapter into its base, and return the folder written.

    Raises:
      UserError: no adapter; a folder that exists.
    """
    from jvlm.adapters.merge_folder import merge_folder
    from jvlm.weights import run_dir

    checkpoint = _checkpoint(arguments)
    if checkpoint.adapter is None:
        raise UserError(f"{checkpoint.folder} holds no adapter to merge")
    target = Path(arguments.output_dir or f"{str(checkpoint.adapter).rstrip('/')}-merged")
    base = run_dir.local(checkpoint.base)
    dtype = arguments.torch_dtype or "keep"
    report = merge_folder(base, checkpoint.adapter, target, dtype=dtype, force=arguments.exist_ok)
    print(f"merged into {target}: {len(report.changed)} tensors changed, {len(report.unchanged)} as they were")
    return target


def export(arguments: ExportArguments) -> None:
    """Do what the arguments ask for, in this order: check, merge, quantise, upload.

    Raises:
      UserError: nothing is asked for, or what is cannot be done with this checkpoint.
    """
    asked = (arguments.merge_lora, arguments.quant_method, arguments.check_for, arguments.hub.push_to_hub)
    if not any(asked):
        raise UserError("nothing to do: give --merge_lora, --quant_method, --check_for or --push_to_hub")
    if arguments.hub.push_to_hub and arguments.hub.hub_model_id is None:
        raise UserError("--push_to_hub true needs --hub_model_id ORG/NAME")
    checkpoint = _checkpoint(arguments)
    for reader in arguments.check_for:
        print(checked(checkpoint, reader))
    folder = checkpoint.folder
    if arguments.merge_lora:
        kept = arguments if arguments.quant_method is None else dataclasses.replace(arguments, output_dir=None)
        folder = merge(kept)
    if arguments.quant_method is not None:
        whole = checkpoint if folder == checkpoint.folder else Checkpoint(str(folder))
        folder = _quantize(arguments, whole)
    if arguments.hub.push_to_hub:
        _push(arguments, folder, checkpoint)


def checked(checkpoint: Checkpoint, reader: str) -> str:
    """Return what a reader would refuse or drop of a checkpoint's adapter, as lines for the terminal."""
    from jvlm.adapters.peft_read import read_peft
    from jvlm.adapters.peft_readers import reader_problems
    from jvlm.weights import io

    if checkpoint.adapter is None:
        return f"{reader}: {checkpoint.folder} is a whole model, which has no adapter to lose"
    config = io.read_config(checkpoint.base)
    problems = reader_problems(read_peft(checkpoint.adapter, config), config, reader)
    if not problems:
        return f"{reader}: reads all of {checkpoint.adapter}"
    return "\n  ".join([f"{reader}: {len(problems)} problems with {checkpoint.adapter}", *problems])


def _checkpoint(arguments: MergeArguments) -> Checkpoint:
    if len(arguments.adapters) > 1:
        raise UserError(f"give one checkpoint, got {', '.join(arguments.adapters)}")
    return checkpoint_model.find(arguments.adapters[0] if arguments.adapters else None, arguments.model)


def _quantize(arguments: ExportArguments, checkpoint: Checkpoint) -> Path:
    from jvlm.adapters import merge as merging
    from jvlm.quantization.calibration import RoundingConfig
    from jvlm.quantization.export import export_quantized

    method = arguments.quant_method
    config = RoundingConfig(method=method, bits=arguments.quant_bits, group_size=arguments.group_size)
    if config.needs_examples and not arguments.dataset:
        raise UserError(f"--quant_method {method} needs --dataset FILE: conversations to calibrate on")
    bits = "" if method == "fp8" else f"-int{arguments.quant_bits}"
    target = Path(arguments.output_dir or f"{str(checkpoint.folder).rstrip('/')}-{method}{bits}")
    model, processor, _ = checkpoint_model.load(checkpoint, arguments.torch_dtype)
    model = model if model.adapters is None else merging.merge(model)
    examples = _calibration(arguments, processor) if arguments.dataset else None
    rounded = export_quantized(model, processor, target, config, examples=examples, dtype=arguments.torch_dtype)
    print(f"{rounded.report()}\nwrote {target}")
    return target


def _calibration(arguments: ExportArguments, processor: Processor) -> Iterator[PackedBatch]:
    """Yield packed batches of at most so many conversations."""
    from jvlm.data.config import DataConfig
    from jvlm.data.position import Share
    from jvlm.data.shards import ExampleSource
    from jvlm.training.validation_data import ValidationData
    from jvlm.training.validation_split import Subset

    source = ExampleSource(arguments.dataset)
    part = Subset(source, range(min(arguments.quant_n_samples, len(source))))
    tokens = arguments.max_length
    data = DataConfig(train=arguments.dataset, batch_size=_SEQUENCES, seq_len=tokens, max_patches=4 * tokens)
    for packed in ValidationData(processor, data, part, Share()):
        yield packed.batch


def _push(arguments: ExportArguments, folder: Path, checkpoint: Checkpoint) -> None:
    from jvlm.hub import card
    from jvlm.hub.uploads import upload

    report = upload(
        folder,
        arguments.hub.hub_model_id,
        private=arguments.hub.hub_private_repo,
        token=arguments.hub.hub_token,
        dry_run=arguments.dry_run,
        base_model=card.base_id(checkpoint.base) if checkpoint.adapter is not None else None,
    )
    print(report.text())
