"""Quantised checkpoints: those of bitsandbytes (NF4, FP4, int8) and of compressed-tensors (fp8, int8, packed int4).

Their matrices are read as `X.weight` with the values that the library of the format would compute from them. Where the
model holds the same format, the codes are taken over as they are.

Axes: i inputs, o outputs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from jaxtyping import Float, UInt8

from jvlm import json_files
from jvlm.quantization import formats
from jvlm.quantization.packing import unpacked
from jvlm.weights.safetensors_files import Tensors
from jvlm.weights.table import WeightError

TRANSPOSED = "o i -> i o"  # a matrix as torch has it, to a kernel

_BITSANDBYTES = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$")
_SIDE = re.compile(
    r"(.+)\.(SCB|weight_format|weight_scale|weight_shape|weight_packed|input_scale|weight_zero_point|weight_g_idx|"
    r"input_zero_point|input_global_scale|weight_global_scale)$"
)
_UNSUPPORTED = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


def open_tensors(folder: Path) -> Tensors:
    """Return the tensors of a folder; of a quantised checkpoint those that its library would see.

    Raises:
      WeightError: a way of quantising that is not read, naming it.
    """
    config = json_files.read_object_if_there(folder / "config.json")
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if settings is None:
        return Tensors(folder)
    method = settings.get("quant_method")
    if method not in ("bitsandbytes", "compressed-tensors"):
        raise WeightError(
            f"{folder / 'config.json'}: quant_method {method!r} is not read; bitsandbytes (NF4, FP4, int8) and "
            "compressed-tensors (float-quantized, int-quantized, pack-quantized) are. Give the folder it was made from"
        )
    return QuantizedTensors(folder, settings)


class QuantizedTensors(Tensors):
    """The tensors of a quantised checkpoint: each of its matrices is one tensor, and what belongs to it is hidden."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        super().__init__(folder)
        try:
            self._parts = self._found(settings)
        except BaseException:
            self.close()
            raise
        self._reused: Counter[str] = Counter()

    def _found(self, settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Return quantised tensor -> its parts' stored names."""
        parts: dict[str, dict[str, str]] = {}
        for raw in super().names():
            if bits := _BITSANDBYTES.fullmatch(raw):
                parts.setdefault(bits[1], {})["quant_state" if bits[2].startswith("quant_state") else bits[2]] = raw
            elif side := _SIDE.fullmatch(raw):
                parts.setdefault(f"{side[1]}.weight", {})[side[2]] = raw
        wrong = [f"{name}: {part}" for name, of in parts.items() for part in of if part in _UNSUPPORTED]
        if wrong:
            raise WeightError(
                f"{self.folder} is quantised with zero points, in the order of activations or with a global scale: it "
                f"is not read ({wrong[0]}, and {len(wrong) - 1} more); make a symmetric one"
            )
        groups = (settings.get("config_groups") or {}).values()
        self._bits = {group["weights"]["num_bits"] for group in groups if group.get("weights")} or {4}
        if any("input_scale" in of for of in parts.values()):
            print(f"{self.folder}: scales of activations are not used, only weights are read", file=sys.stderr)
        return parts

    def format_of(self, name: str) -> str | None:
        """Return how a tensor is stored: a key of `formats.PARTS`, "fp4", "packed int4", or None for plain values."""
        of = self._parts.get(name)
        if of is None:
            return None
        if "quant_state" in of:
            kind = "fp4" if "fp4" in of["quant_state"] else "nf4"
            return f"{kind}x2" if "nested_absmax" in of else kind
        if "weight_packed" in of:
            return f"packed int{self._packed_bits()}"
        return {"I8": "int8", "F8_E4M3": "fp8"}.get(self._slice(name).get_dtype(), self._slice(name).get_dtype())

    def _packed_bits(self) -> int:
        if len(self._bits) > 1 or not self._bits <= {4, 8}:
            raise WeightError(f"{self.folder}: packed integers of {sorted(self._bits)} bits are not read; 4 or 8 are")
        return next(iter(self._bits))

    def names(self) -> list[str]:
        hidden = {raw for of in self._parts.values() for raw in of.values()}
        return [n for n in super().names() if n not in hidden] + [
            n for n, of in self._parts.items() if "weight_packed" in of
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        of = self._parts.get(name, {})
        if "quant_state" in of:
            return tuple(self._state(name)["shape"])
        if "weight_packed" in of:
            return tuple(int(n) for n in super().read(of["weight_shape"]))
        return super().shape(name)

    def dtypes(self, names: Iterable[str]) -> dict[str, np.dtype]:
        result = {}
        for name in names:
            of = self._parts.get(name, {})
            if "quant_state" in of:
                result[name] = np.dtype(self._state(name)["dtype"])
            elif of:
                result[name] = super().dtypes([of.get("weight_scale") or of["SCB"]]).popitem()[1]
            else:
                result |= super().dtypes([name])
        return result

    def _state(self, name: str) -> dict[str, Any]:
        return json.loads(super().read(self._parts[name]["quant_state"]).tobytes())

    def read(self, name: str) -> np.ndarray:
        """Return a tensor's values; of a quantised one in float32, [out, in]."""
        if name not in self._parts:
            return super().read(name)
        format = self.format_of(name)
        if format in ("nf4", "nf4x2", "fp4", "fp4x2"):
            codes, absmax, table = self._four_bits(name)
            values = table[codes]
            blocks = np.pad(values, (0, -values.size % self._state(name)["blocksize"]))
            scaled = blocks.reshape(absmax.size, -1) * absmax[:, None]
            return scaled.reshape(-1)[: values.size].reshape(self.shape(name))
        if format.startswith("packed"):
            words = super().read(self._parts[name]["weight_packed"])
            codes, scale = unpacked(words, self.shape(name), self._packed_bits()), self._scale(name)
        elif format in ("int8", "fp8"):
            codes = super().read(name) if format == "int8" else self.bytes_of(name).view(formats.FP8)
            scale = self._scale(name)
        else:
            raise WeightError(f"{self.folder}: {name} is stored as {format}, which is not read")
        return _scaled(codes, scale, name)

    def _scale(self, name: str) -> np.ndarray:
        of = self._parts[name]
        if "SCB" in of:
            return super().read(of["SCB"])[:, None] / np.float32(127)
        return super().read(of["weight_scale"])

    def _four_bits(self, name: str) -> tuple[UInt8[np.ndarray, " n"], Float[np.ndarray, " b"], Float[np.ndarray, "16"]]:
        of, state = self._parts[name], self._state(name)
        packed = super().read(name).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: int(np.prod(state["shape"]))]
        absmax = super().read(of["absmax"])
        if "nested_absmax" in of:
            nested = super().read(of["nested_absmax"]), np.float32(state["nested_offset"])
            absmax = formats.double_dequantized(absmax, *nested, super().read(of["nested_quant_map"]))
        return codes, absmax, super().read(of["quant_map"])

    def parts(self, name: str, format: str) -> dict[str, np.ndarray] | None:
        """Return the parts of a kernel [in, out] in a format, if the tensor is stored in that; None if it is plain.

        Raises:
          WeightError: a tensor in another format: quantised twice it would lose twice.
        """
        stored = self.format_of(name)
        if stored is None:
            return None
        if stored != format or not self._can_keep(name):
            names = {"nf4": "nf4 without double", "nf4x2": "nf4 with double"}
            crossing = " in blocks, or with values, that kernels here do not have" if stored == format else ""
            raise WeightError(
                f"{self.folder}: {name} is stored as {names.get(stored, stored)}{crossing}, and quantize asks for "
                f"{names.get(format, format)}: to quantise it again would lose twice; make quantize the same, or leave "
                "it out to have values in the parameters' dtype"
            )
        self._reused[stored] += 1
        if format in ("int8", "fp8"):
            codes = super().read(name) if format == "int8" else self.bytes_of(name)
            return {"codes": np.ascontiguousarray(codes.T), "scale": self._scale(name).astype(np.float32).reshape(-1)}
        rows, columns = self.shape(name)
        of, state = self._parts[name], self._state(name)
        parts = {"codes": formats.arranged(self._four_bits(name)[0].reshape(rows, columns))}
        absmax = super().read(of["absmax"]).reshape(rows, -1)
        if format == "nf4":
            return {**parts, "scale": np.ascontiguousarray(absmax.T)}
        largest, offset = super().read(of["nested_absmax"]), np.asarray(state["nested_offset"], np.float32)
        return {**parts, "scale_codes": absmax, "scale_scale": largest, "scale_offset": offset}

    def _can_keep(self, name: str) -> bool:
        of = self._parts[name]
        if "weight_scale" in of:
            return super().shape(of["weight_scale"]) == (self.shape(name)[0], 1)
        if "quant_state" not in of:
            return True
        state = self._state(name)
        if state["blocksize"] != formats.BLOCK or self.shape(name)[1] % formats.BLOCK:
            return False
        if not np.array_equal(super().read(of["quant_map"]), formats.NF4):
            return False
        nested = of.get("nested_quant_map")
        return nested is None or (
            state["nested_blocksize"] == formats.SCALE_BLOCK
            and np.array_equal(super().read(nested), formats.dynamic_map())
        )

    def report(self, dtype: str) -> str:
        """Return what became of the quantised matrices: kept as codes, or values in a dtype."""
        stored = Counter(self.format_of(name) for name in self._parts)
        lines = []
        for format, count in sorted(stored.items()):
            reused = self._reused[format]
            lines.append(
                f"{count} matrices stored as {format}: {reused} kept as they are, "
                f"{count - reused} dequantised to {dtype}"
            )
        return f"{self.folder}: " + "; ".join(lines)


def _scaled(codes: np.ndarray, scale: np.ndarray, name: str) -> Float[np.ndarray, "o i"]:
    """Return codes [out, in] times scales [out, 1], [1] or [out, groups], as compressed-tensors does: in its dtype."""
    if scale.size == 1 or scale.shape == (len(codes), 1):
        values = codes.astype(scale.dtype) * scale.reshape(-1, 1)
    elif scale.ndim == 2 and scale.shape[0] == len(codes) and codes.shape[1] % scale.shape[1] == 0:
        grouped = codes.astype(scale.dtype).reshape(*scale.shape, -1)
        values = (grouped * scale[..., None]).reshape(codes.shape)
    else:
        raise WeightError(
            f"{name} has scales of shape {scale.shape} for codes of shape {codes.shape}, which is not read; one for "
            "the tensor, one for each output, and one for each group of its inputs are"
        )
    return values.astype(np.float32)


def stored_parts(tensors: Tensors, name: str, pattern: str | None, format: str) -> dict[str, np.ndarray] | None:
    """Return `QuantizedTensors.parts`, of a tensor that is a kernel turned around; None for plain tensors."""
    if not isinstance(tensors, QuantizedTensors):
        return None
    if tensors.format_of(name) is not None and pattern != TRANSPOSED:
        raise WeightError(f"{tensors.folder}: {name} is quantised, and its order of values is another here ({pattern})")
    return tensors.parts(name, format)


def report(tensors: Tensors, dtype: str) -> None:
    """Print, for a quantised folder, what was kept and what was not."""
    if isinstance(tensors, QuantizedTensors):
        print(tensors.report(dtype), file=sys.stderr)
