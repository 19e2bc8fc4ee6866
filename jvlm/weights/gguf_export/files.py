"""Writing one GGUF file: keys, then tensors one at a time, in a number format."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jvlm.errors import UserError, file_errors
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.weights import table
from jvlm.weights.table import Entry

# Those that numpy computes. llama.cpp's own llama-quantize makes K-quants out of a file in f16 or bf16.
Format = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FORMATS = get_args(Format)
_FILE_TYPES = {"f32": "ALL_F32", **{name: f"MOSTLY_{name.upper()}" for name in FORMATS[1:]}}
# Embedding table and head suffer most from few bits (llama-quantize keeps the head in 6).
_FINE = ("token_embd.weight", "output.weight")
# Routers and tables of positions, as in llama.cpp's converter.
_ALWAYS_F32 = (".ffn_gate_inp.weight", "v.position_embd.weight")
ReadLayer = Callable[[str, int | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write, in numpy's order of axes; ``read`` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
      formats: how many tensors are in each number format; vectors stay in f32.
    """

    path: Path
    formats: Mapping[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} in {name}" for name, count in sorted(self.formats.items()))
        return f"{self.path}: {self.path.stat().st_size:,} bytes, tensors {counts}"


def require_new(path: Path) -> None:
    """Raise UserError if the file is there already."""
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or give another folder")


def library() -> Any:
    """Return the gguf package. Raises UserError if it is not installed."""
    try:
        importlib.import_module("gguf.quants")
    except ImportError as error:
        raise UserError("GGUF files are written with gguf: pip install 'jvlm[backbones]'") from error
    return importlib.import_module("gguf")


def write(
    path: Path, architecture: str, keys: Callable[[Any], None], tensors: Iterable[Tensor], format: str | None
) -> Written:
    """Write a file. It takes its name when it is whole.

    Args:
      keys: adds the keys to a `gguf.GGUFWriter`.
      format: of matrices whose rows it can divide into blocks; the others are in f16. None is f32, unmarked.

    Raises:
      UserError: an unknown format; a value that f16 cannot hold, naming its tensor; a file that cannot be written.
    """
    if format is not None and format not in FORMATS:
        raise UserError(
            f"unknown GGUF format {format!r}; known: {', '.join(FORMATS)}. llama.cpp's llama-quantize makes others, as "
            "Q4_K_M, out of a file in f16 or bf16"
        )
    gguf, tensors = library(), list(tensors)
    writer = gguf.GGUFWriter(None, architecture)
    keys(writer)
    if format is not None:
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[format]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = [_kind(gguf, tensor, format or "f32") for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    part = path.with_name(f"{path.name}.partial")
    try:
        with file_errors(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, kinds, strict=True):
            content = _encoded(gguf, tensor, kind)
            with file_errors(path, "written"):
                writer.write_tensor_data(content)
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind.name.lower()] = counts.get(kind.name.lower(), 0) + 1
    return Written(path, counts)


def write_model(
    model: VLM,
    path: Path,
    architecture: str,
    kind: str,
    keys: Callable[[Any], None],
    tensors: Iterable[Tensor],
    *,
    format: str,
    name: str | None,
) -> Written:
    """Write a part of a model as `write` does.

    Args:
      kind: what general.type says, "model" or "mmproj".
      name: of the model, as llama.cpp shows it.

    Raises: as `write`; UserError for a model with adapters.
    """
    if model.adapters is not None:
        raise UserError("the model has adapters: merge them first, or write them by themselves with write_lora")

    def all_keys(writer: Any) -> None:
        if name:
            writer.add_name(name)
        writer.add_type(kind)
        keys(writer)

    return write(path, architecture, all_keys, tensors, format)


def _kind(gguf: Any, tensor: Tensor, format: str) -> Any:
    kinds = gguf.GGMLQuantizationType
    # llama.cpp adds vectors in f32, and convolves with f32 kernels whatever the rest is in; experts are [experts, o, i]
    is_matrix = len(tensor.shape) in (2, 3) and not tensor.name.endswith(_ALWAYS_F32)
    if format == "f32" or not is_matrix:
        return kinds.F32
    kind = kinds.Q8_0 if tensor.name in _FINE and format.startswith(("q4", "q5")) else kinds[format.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kinds.F16 if tensor.shape[-1] % block else kind


def _encoded(gguf: Any, tensor: Tensor, kind: Any) -> np.ndarray:
    value = np.ascontiguousarray(tensor.read(), np.float32)
    if value.shape != tuple(tensor.shape):
        raise UserError(f"{tensor.name}: announced {tensor.shape}, got {value.shape}")
    if kind == gguf.GGMLQuantizationType.F16:
        most = float(np.abs(value).max(initial=0))
        if most > np.finfo(np.float16).max:
            raise UserError(f"{tensor.name} holds {most:g}, and f16 ends at 65504: write bf16 or f32")
        return value.astype(np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.F32:
        return value.view(np.uint8)
    return gguf.quants.quantize(value, kind)


def entries(model: VLM) -> list[Entry]:
    """Return the tensors of a model, as its Hugging Face form has them. Raises WeightError if it has none."""
    shapes = {path: tuple(v.get_value().shape) for path, v in vlm.parameters(model).items()}
    return table.entries(model.config, shapes)


def values_of(model: VLM) -> ReadLayer:
    """Return what reads a parameter of a model by path, or one layer of it."""
    variables = vlm.parameters(model)

    def read(path: str, layer: int | None) -> np.ndarray:
        value = variables[path].get_value()
        return np.asarray(value if layer is None else value[layer], np.float32)

    return read


def tensor_of(entry: Entry, name: str, read: ReadLayer) -> Tensor:
    """Return a parameter in the order of a checkpoint."""
    return Tensor(name, entry.shape, lambda: entry.to_checkpoint(read(entry.path, entry.layer)))
