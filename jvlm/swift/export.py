"""``jvlm export`` and ``jvlm merge-lora``: what becomes of a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jvlm.errors import UserError
from jvlm.swift import checkpoint_model
from jvlm.swift.checkpoint_model import Checkpoint
from jvlm.swift.export_arguments import ExportArguments, MergeArguments


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
    target = _target(arguments, checkpoint, "merged")
    if target.exists() and any(target.iterdir()) and not arguments.exist_ok:
        raise UserError(
            f"{target} exists: go on with it (--model {target} in place of --adapters), or replace it "
            "with --exist_ok true"
        )
    base = run_dir.local(checkpoint.base)
    dtype = arguments.torch_dtype or "keep"
    report = merge_folder(base, checkpoint.adapter, target, dtype=dtype, force=arguments.exist_ok)
    kept = f"; to {len(report.unchanged)} more it adds less than rounding takes" if report.unchanged else ""
    print(f"merged into {target}: {len(report.changed)} tensors changed{kept}")
    return target


def export(arguments: ExportArguments) -> None:
    """Do what the arguments ask for, in this order: check, merge, quantise or convert, upload.

    Raises:
      UserError: nothing is asked for, or what is cannot be done with this checkpoint.
    """
    _check_arguments(arguments)
    checkpoint = _checkpoint(arguments)
    for reader in arguments.check_for:
        print(checked(checkpoint, reader))
    model = checkpoint
    if arguments.merge_lora:
        goes_on = arguments.quant_method is not None or arguments.to_gguf
        model = Checkpoint(str(merge(dataclasses.replace(arguments, output_dir=None) if goes_on else arguments)))
    folder = model.folder
    if arguments.quant_method is not None:
        from jvlm.swift.quantize import quantize

        method = arguments.quant_method
        made = method if method == "fp8" else f"{method}-int{arguments.quant_bits}"
        folder = _target(arguments, model, made)
        quantize(arguments, model, checkpoint, folder)
    elif arguments.to_gguf:
        folder = _target(arguments, model, "gguf")
        _write_gguf(arguments, model, folder)
    elif arguments.plain_lora:
        folder = _target(arguments, model, "plain")
        _write_plain(model, folder)
    if arguments.hub.push_to_hub:
        _push(arguments, folder, checkpoint)


def _check_arguments(arguments: ExportArguments) -> None:
    made = {
        "--quant_method": arguments.quant_method is not None,
        "--to_gguf": arguments.to_gguf,
        "--plain_lora": arguments.plain_lora,
    }
    asked = [name for name, is_asked in made.items() if is_asked]
    if not (asked or arguments.merge_lora or arguments.check_for or arguments.hub.push_to_hub):
        raise UserError(f"nothing to do: give --merge_lora, {', '.join(made)}, --check_for or --push_to_hub")
    if len(asked) > 1:
        raise UserError(
            f"{' and '.join(asked)} write different folders: run jvlm export once for each. Bits of GGUF files are set "
            "by --gguf_type"
        )
    if arguments.plain_lora and arguments.merge_lora:
        raise UserError("--plain_lora writes an adapter, and --merge_lora a model: give one of them")
    if arguments.hub.push_to_hub and arguments.hub.hub_model_id is None:
        raise UserError("--push_to_hub true needs --hub_model_id ORG/NAME")


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
    fixes = {"merge the adapter": "--merge_lora true", "write the plain form": "--plain_lora true"}
    hints = [option for words, option in fixes.items() if any(words in problem for problem in problems)]
    lines = [f"{reader}: {len(problems)} problems with {checkpoint.adapter}", *problems]
    return "\n  ".join([*lines, *([f"jvlm export {' or '.join(hints)} does that"] if hints else [])])


def _checkpoint(arguments: MergeArguments) -> Checkpoint:
    if len(arguments.adapters) > 1:
        raise UserError(f"give one checkpoint, got {', '.join(arguments.adapters)}")
    return checkpoint_model.find(arguments.adapters[0] if arguments.adapters else None, arguments.model)


def _target(arguments: MergeArguments, checkpoint: Checkpoint, made: str) -> Path:
    """Return the folder to write: --output_dir, or one beside the checkpoint named after what is made of it."""
    place = checkpoint.local_name
    return Path(arguments.output_dir) if arguments.output_dir else place.with_name(f"{place.name}-{made}")


def _write_gguf(arguments: ExportArguments, checkpoint: Checkpoint, folder: Path) -> None:
    from jvlm.adapters import folders
    from jvlm.weights import gguf_export, io, run_dir

    name = checkpoint.local_name.name
    if checkpoint.adapter is None:
        formats = {"format": arguments.gguf_type, "vision_format": arguments.mmproj_type}
        written = gguf_export.export_folder(checkpoint.base, folder, name=name, **formats)
    else:
        config = io.read_config(run_dir.local(checkpoint.base, weights=False))
        path = folder / f"{name}-lora-f32.gguf"
        gguf_export.files.require_new(path)
        written = [gguf_export.write_lora(folders.read(checkpoint.adapter, config), config, path)]
    for file in written:
        print(f"wrote {file}")


def _write_plain(checkpoint: Checkpoint, folder: Path) -> None:
    from jvlm.adapters import neutral
    from jvlm.adapters.peft_read import read_peft
    from jvlm.adapters.peft_write import write_peft
    from jvlm.hub.card import base_id
    from jvlm.weights import io, run_dir

    if checkpoint.adapter is None:
        raise UserError(f"{checkpoint.folder} is a whole model: --plain_lora rewrites an adapter")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --output_dir")
    config = io.read_config(run_dir.local(checkpoint.base, weights=False))
    plain = neutral.plain(read_peft(checkpoint.adapter, config))
    write_peft(plain, config, folder, base_name=base_id(checkpoint.base) or checkpoint.base)
    print(f"wrote {folder}: {len(plain.low_rank)} adapters of rank {plain.config.rank}, with a scale of 1")


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
