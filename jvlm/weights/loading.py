"""`jvlm.load`: one call for every kind of folder."""

from __future__ import annotations

from pathlib import Path

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.weights import checkpoint, run_folder


def load(
    path: str | Path,
    *,
    precision: Precision | None = None,
    sharding: checkpoint.ShardingOf | None = None,
    step: int | None = None,
    grow_embedding: bool = False,
) -> tuple[VLM, Processor]:
    """A model and its processor from a Hugging Face snapshot folder or a jvlm run folder.

    Every parameter is read tensor by tensor into its (sharded) array; no second copy of the model exists.

    Args:
      path: the folder; of one in an object store (gs://...) the small files, and safetensors, are copied to this
        machine, under ``copies/``, and the arrays of a run are read from there.
      precision: dtypes and implementations; the default is float32 parameters and, on CPU, float32 compute
        (bfloat16 elsewhere). For a run folder the default is what it was trained with.
      sharding: gives the sharding of a parameter from its path and variable; None puts it on the first device.
      step: which checkpoint of a run folder; None is the latest.
      grow_embedding: where tokens of the tokenizer have no row in the embedding table, give them rows (and columns of
        an untied head), each the mean of the others; without it such a folder is refused. A tokenizer that lacks the
        tokens that end a turn in its family's template, as Idefics2-8b-base's does, gets them too.

    Raises:
      UserError: no such folder, or one that holds neither kind of model.
      jvlm.weights.table.WeightError: wrong, missing or extra tensors, all of them listed.
      jvlm.errors.UserError: a file that cannot be read; tokens without a row in the embedding table.
    """
    folder = run_folder.local(path)
    config = read_config(folder, precision)
    if run_folder.is_run(folder):
        return run_folder.load(folder, precision=precision, sharding=sharding, step=step, grow_embedding=grow_embedding)
    if step is not None:
        raise UserError(f"step {step}: {folder} is a Hugging Face folder, which has no steps")
    processor = checkpoint.load_processor(folder, config, grow_embedding=grow_embedding)
    rows = config.decoder.vocab_size if grow_embedding else None
    return checkpoint.load_weights(folder, processor.model, sharding, stored_rows=rows), processor


def read_config(path: str | Path, precision: Precision | None = None) -> VLMConfig:
    """The model that a folder of either kind holds, without its weights. Raises UserError as `load` does."""
    folder = run_folder.local(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder (nothing is downloaded from a hub: give a snapshot)")
    if run_folder.is_run(folder):
        return run_folder.model_config(folder, precision)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has neither config.json (Hugging Face) nor experiment.json (jvlm run)")
    return checkpoint.read_config(folder, precision)
