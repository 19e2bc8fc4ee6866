"""The arguments of ``jvlm export`` and ``jvlm merge-lora``, with ms-swift's names and defaults."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jvlm.options import FLAT
from jvlm.swift.arguments import HubArguments

Reader = Literal["vllm", "sglang", "llama.cpp", "transformers"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@dataclasses.dataclass(frozen=True)
class MergeArguments:
    """Add an adapter to the model that it was trained on. Arguments and defaults are ms-swift's.

    Attributes:
      adapters: checkpoint folder of an adapter.
      model: folder of its base; None is what the checkpoint names.
      output_dir: folder to write; None is CHECKPOINT-merged, or CHECKPOINT with the name of what is made of it.
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
    """Merge, quantise, convert, check and upload a checkpoint. Arguments and defaults are ms-swift's.

    Attributes:
      merge_lora: add the adapter to its base.
      quant_method: write the merged model with the language model's matrices in fewer bits, as compressed-tensors has
        them: "fp8", "gptq", "awq", or "rtn", which rounds to nearest.
      quant_bits: bits of gptq, awq and rtn.
      group_size: inputs that share a scale; it must divide the language model's widths.
      dataset: conversations to calibrate gptq and awq on; with them the error of the outputs is measured.
      columns: new names of its examples' fields, as in jvlm sft.
      load_data_args: calibrate on the conversations that the checkpoint was trained on.
      media_root: folder for relative media paths of dataset, after the data file's own.
      quant_n_samples: how many conversations.
      max_length: of a calibration sequence, in tokens; longer conversations are left out.
      to_gguf: write GGUF files for llama.cpp: of a whole or merged model the language model, and the vision tower where
        llama.cpp has one; of an adapter without --merge_lora the adapter alone.
      gguf_type: number format of the language model's matrices in it; adapters are in f32.
      mmproj_type: number format of the vision tower's matrices.
      plain_lora: write the adapter as LoRA of one rank with a scale of 1, which programs read right that know neither
        rsLoRA nor ranks and alphas by pattern.
      check_for: say what another program would refuse, or drop in silence, of the adapter.
      dry_run: with --push_to_hub, list the files that would be sent, and send nothing.
      hub: uploading to a hub.
    """

    merge_lora: bool = False
    quant_method: Literal["fp8", "gptq", "awq", "rtn"] | None = None
    quant_bits: Literal[4, 8] = 4
    group_size: int = 128
    dataset: tuple[str, ...] = ()
    columns: str | None = None
    load_data_args: bool = False
    media_root: str | None = None
    quant_n_samples: int = 256
    max_length: int = 2048
    to_gguf: bool = False
    gguf_type: GGUFType = "f16"
    mmproj_type: GGUFType = "f16"
    plain_lora: bool = False
    check_for: tuple[Reader, ...] = ()
    dry_run: bool = False
    hub: Annotated[HubArguments, FLAT] = HubArguments()
