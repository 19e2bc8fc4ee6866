"""`jvlm.load` and `jvlm.save`: one call each for every kind of folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jvlm.adapters import merge, peft_load
from jvlm.adapters.attach import extract
from jvlm.adapters.peft_read import is_adapter
from jvlm.adapters.peft_write import write_peft
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.hub.ids import require_id
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.quantization.config import QuantizationConfig
from jvlm.weights import hf, run_dir


def load(
    path: str | Path,
    *,
    precision: Precision | None = None,
    sharding: hf.ShardingOf | None = None,
    step: int | Literal["best"] | None = None,
    grow_embedding: bool = False,
    quantize: QuantizationConfig | None = None,
    adapter: str | Path | None = None,
) -> tuple[VLM, Processor]:
    """Return a model and its processor from a Hugging Face folder, a jvlm run folder, or an id on the Hub.

    Every parameter is read tensor by tensor into its (sharded) array; no second copy of the model exists.

    Args:
      path: the folder, or the id ("ORG/NAME", "ORG/NAME@REVISION") of one that is downloaded (`jvlm.hub`); of one in an
        object store (gs://...) the small files, and safetensors, are copied to this machine, under ``copies/``, and the
        arrays of a run are read from there.
      precision: dtypes and implementations; the default is float32 parameters and, on CPU, float32 compute
        (bfloat16 elsewhere). For a run folder the default is what it was trained with.
      sharding: gives the sharding of a parameter from its path and variable; None puts it on the first device.
      step: which checkpoint of a run folder; None is the latest, "best" the best one by the run's validation, as is a
        path that ends in it (``runs/demo/best``).
      grow_embedding: where tokens of the tokenizer have no row in the embedding table, give them rows (and columns of
        an untied head), each the mean of the others; without it such a folder is refused. A tokenizer that lacks the
        tokens that end a turn in its family's template, as Idefics2-8b-base's does, gets them too.
      quantize: hold these matrices quantised, each from the moment it is read; the model can then not be trained but
        through adapters. Of a run that was trained so, None keeps its own.
      adapter: a PEFT folder, or a run that trained adapters, whose adapter is put on the model. ``path`` may be a PEFT
        folder too, if the base that it names is there.

    Raises:
      UserError: no such folder, or one that holds neither kind of model.
      jvlm.weights.table.WeightError: wrong, missing or extra tensors, all of them listed.
      jvlm.errors.UserError: a file that cannot be read; tokens without a row in the embedding table.
    """
    folder, best = run_dir.split_best(Path(path))
    step = best or step
    folder = run_dir.local(folder if best else path)
    if adapter is not None or is_adapter(folder):
        base, adapter = (folder, adapter) if adapter else (peft_load.base_of(folder), folder)
        model, processor = load(
            base, precision=precision, sharding=sharding, step=step, grow_embedding=grow_embedding, quantize=quantize
        )
        return peft_load.with_adapter(model, adapter, sharding), processor
    config = read_config(folder, precision)
    if run_dir.is_run(folder):
        return run_dir.load(
            folder,
            precision=precision,
            sharding=sharding,
            step=step,
            grow_embedding=grow_embedding,
            quantize=quantize,
        )
    if step is not None:
        raise UserError(f"step {step}: {folder} is a Hugging Face folder, which has no steps")
    processor = hf.load_processor(folder, config, grow_embedding=grow_embedding)
    rows = config.decoder.vocab_size if grow_embedding else None
    return hf.load_weights(folder, processor.model, sharding, stored_rows=rows, quantize=quantize), processor


def read_config(path: str | Path, precision: Precision | None = None) -> VLMConfig:
    """Return the model that a folder of either kind holds, without its weights. Raises UserError as `load` does."""
    folder, best = run_dir.split_best(Path(path))
    folder = run_dir.local(folder if best else path, weights=False)
    if not folder.is_dir():
        require_id(folder)
        raise UserError(f"{folder} is not a folder")
    if is_adapter(folder):
        return read_config(peft_load.base_of(folder), precision)
    if run_dir.is_run(folder):
        return run_dir.model_config(folder, precision)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has neither config.json (Hugging Face) nor experiment.json (jvlm run)")
    return hf.read_config(folder, precision)


def save(
    model: VLM,
    processor: Processor,
    path: str | Path,
    format: Literal["hf", "jvlm", "peft"] = "hf",
    *,
    dtype: str | None = None,
    layout: str = "released",
    max_shard_bytes: int = 5 * 10**9,
    base: str | None = None,
) -> None:
    """Write a folder that `jvlm.load` reads: for transformers, vLLM and SGLang ("hf"), or a run folder ("jvlm").

    Of a model with adapters, "hf" is the merged model, and "peft" the adapters alone.

    Args:
      format: "jvlm" serves every model, also those without a public form, keeps the parameters as they are, and takes
        none of the options below.
      dtype: of every tensor; None keeps each as it was stored in the checkpoint it came from (its parameter
        dtype if it came from none).
      layout: tensor names, "released" (as published checkpoints) or "transformers" (as >= 4.52 in memory).
      max_shard_bytes: start a new file above this size.
      base: folder, or id on the Hub, of the model that the adapters of "peft" stand beside; written into their files.

    Raises:
      jvlm.weights.table.WeightError: "hf" for an architecture without a public form; "jvlm" into a run's folder; values
        that the dtype cannot hold, with all tensors that have some.
      jvlm.errors.UserError: an unknown format, dtype or layout, or an option that the format does not take.
    """
    if base is not None and format != "peft":
        raise UserError(f"format {format!r} holds the whole model: leave out base")
    if format == "hf":
        model, read = (model, None) if model.adapters is None else merge.merged_parameters(model)
        hf.save(model, processor, Path(path), dtype=dtype, layout=layout, max_shard_bytes=max_shard_bytes, read=read)
    elif format == "peft":
        if layout != "released":
            raise UserError("format 'peft' has layouts of its own: leave out layout, or use jvlm.adapters.peft_write")
        write_peft(extract(model), model.config, path, base_name=base, dtype=dtype)
    elif format == "jvlm":
        if dtype is not None or layout != "released":
            raise UserError("format 'jvlm' keeps the parameters as they are: leave out dtype and layout")
        run_dir.save(model, processor, Path(path))
    else:
        raise UserError(f"unknown format {format!r}; supported: 'hf', 'jvlm', 'peft'")
