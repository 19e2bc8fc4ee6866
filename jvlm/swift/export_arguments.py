"""The arguments of ``jvlm export`` and ``jvlm merge-lora``, with ms-swift's names and defaults."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jvlm.options import FLAT
from jvlm.swift.arguments import HubArguments

Reader = Literal["vllm", "sglang", "llama.cpp", "transformers"]


@dataclasses.dataclass(frozen=True)
class MergeArguments:
    """Add an adapter to the model that it was trained on. Arguments and defaults are ms-swift's.

    Attributes:
      adapters: checkpoint folder of an adapter.
      model: folder of its base; None is what the checkpoint names.
      output_dir: folder to write; None is CHECKPOINT-merged.
      torch_dtype: of the tensors; None keeps each as the base has it.
      exist_ok: replace a merged model that is there.
    """

    adapters: tuple[str, ...] = ()
    model: str | None = None
    output_dir: str | None = None
    torch_dtype: Literal["bfloat16", "float32", "float16"] | None = None
    exist_ok: bool = False


@dataclasses.dataclass(frozen=True)
class ExportArguments(MergeArguments):
    """Merge, quantise, check and upload a checkpoint. Arguments and defaults are ms-swift's.

    Attributes:
      merge_lora: add the adapter to its base.
      quant_method: write the language model's matrices in fewer bits, after merging: "fp8", "gptq", "awq", or "rtn",
        which rounds to nearest.
      quant_bits: bits of gptq, awq and rtn.
      group_size: inputs that share a scale.
      dataset: conversations to calibrate gptq and awq on.
      quant_n_samples: how many of them.
      max_length: of a calibration sequence, in tokens.
      check_for: say what another program would refuse, or drop in silence, of the adapter.
      dry_run: with --push_to_hub, list the files that would be sent, and send nothing.
      hub: uploading to a hub.
    """

    merge_lora: bool = False
    quant_method: Literal["fp8", "gptq", "awq", "rtn"] | None = None
    quant_bits: Literal[4, 8] = 4
    group_size: int = 128
    dataset: tuple[str, ...] = ()
    quant_n_samples: int = 256
    max_length: int = 2048
    check_for: tuple[Reader, ...] = ()
    dry_run: bool = False
    hub: Annotated[HubArguments, FLAT] = HubArguments()
