"""``jvlm convert``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from jvlm.errors import UserError
from jvlm.options import parse
from jvlm.weights.convert import DType, convert
from jvlm.weights.gguf_onnx import unpack

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint as a Hugging Face folder, with one tensor in memory at a time.

    A jvlm run becomes a folder for transformers, vLLM and SGLang; a language model (Llama) in one GGUF file, or a
    DINOv2 backbone in one ONNX file, becomes a folder that jvlm starts from.

    Attributes:
      source: a Hugging Face folder, a jvlm run, an id on the Hub, a .gguf or .onnx file.
      target: a new folder.
      layout: tensor names, as in the released checkpoint or as transformers has them in memory.
      dtype: of every tensor; "keep" leaves each as it is stored.
      shard_size: most bytes of a file, as 5GB, 500MB or 2GiB.
      step: which checkpoint of a run; None takes the latest.
      grow_embedding: give tokens without a row in the embedding table one (their mean).
    """

    source: Positional[Path]
    target: Positional[Path]
    layout: str = "released"
    dtype: DType = "keep"
    shard_size: str = "5GB"
    step: int | None = None
    grow_embedding: bool = False


def run(words: list[str]) -> int:
    options = parse(Convert, words, "jvlm convert")
    if options.source.suffix in (".gguf", ".onnx"):
        unpack(options.source, options.target)
    else:
        _convert(options)
    print(f"wrote {options.target}")
    return 0


def _convert(options: Convert) -> None:
    with tqdm(unit="tensor", disable=None) as bar:

        def show(name: str, number: int, count: int) -> None:
            bar.total = count
            bar.set_postfix_str(name, refresh=False)
            bar.update(number - bar.n)

        convert(
            options.source,
            options.target,
            layout=options.layout,
            dtype=options.dtype,
            max_shard_bytes=size(options.shard_size),
            step=options.step,
            grow_embedding=options.grow_embedding,
            on_tensor=show,
        )


def size(text: str) -> int:
    """Return the bytes of "5GB", "500 MB", "2GiB" or a plain number. Raises UserError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--shard_size: {text!r} is not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
