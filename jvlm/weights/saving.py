"""`jvlm.save`: one call for every kind of folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models.vlm import VLM
from jvlm.weights import checkpoint, run_folder


def save(
    model: VLM,
    processor: Processor,
    path: str | Path,
    format: Literal["hf", "jvlm"] = "hf",
    *,
    dtype: str | None = None,
    layout: str = "released",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `jvlm.load` reads: for transformers, vLLM and SGLang ("hf"), or a run folder ("jvlm").

    Args:
      format: "jvlm" serves every model, also those without a public form, keeps the parameters as they are, and takes
        none of the options below.
      dtype: of every tensor; None keeps each as it was stored in the checkpoint it came from (its parameter
        dtype if it came from none).
      layout: tensor names, "released" (as published checkpoints) or "transformers" (as >= 4.52 in memory).
      max_shard_bytes: start a new file above this size.

    Raises:
      jvlm.weights.table.WeightError: "hf" for an architecture without a public form; "jvlm" into a run's folder; values
        that the dtype cannot hold, with all tensors that have some.
      jvlm.errors.UserError: an unknown format, dtype or layout, or an option that the format does not take.
    """
    if format == "hf":
        checkpoint.save(model, processor, Path(path), dtype=dtype, layout=layout, max_shard_bytes=max_shard_bytes)
    elif format == "jvlm":
        if dtype is not None or layout != "released":
            raise UserError("format 'jvlm' keeps the parameters as they are: leave out dtype and layout")
        run_folder.save(model, processor, Path(path))
    else:
        raise UserError(f"unknown format {format!r}; supported: 'hf', 'jvlm'")
