"""The modules of a model as PEFT sees them: their names, and both sides of each map in the order of files."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal

import numpy as np
from jaxtyping import Float

from jvlm.adapters.weights import Target
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.weights import table
from jvlm.weights.table import Entry
from jvlm.weights.vocabulary import EMBEDDING, HEAD

Layout = Literal["new", "old"]
# Names of modules as transformers >= 4.52 has them in memory, and as before, in the weight table's spellings.
LAYOUTS: dict[Layout, str] = {"new": "transformers", "old": "released"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A module with a weight, and perhaps a bias.

    Attributes:
      name: in the spelling of the weight table, without ".weight".
      kind: "linear", "conv" (a patch embedding), "embedding" (of tokens), or "other" (norms), which takes no adapter.
    """

    name: str
    kind: Literal["linear", "conv", "embedding", "other"]
    weight: Entry
    bias: Entry | None

    @property
    def target(self) -> Target:
        return target_of(self.weight)

    @property
    def d_out(self) -> int:
        """Outputs of a linear map or convolution; the width of an embedding."""
        return self.weight.shape[1 if self.kind == "embedding" else 0]

    def input_to_param(self, a: Float[np.ndarray, "r ..."]) -> Float[np.ndarray, "i r"]:
        """Return the first matrix of the file, [rank, *inputs] in the file's order, as [inputs, rank] in jvlm's."""
        if self.weight.pattern is None:
            return a.T
        _, inputs, our_inputs, _ = self._sides()
        return self._side(f"rank {inputs} -> {our_inputs} rank").to_param(a)

    def input_to_checkpoint(self, a: Float[np.ndarray, "i r"]) -> Float[np.ndarray, "r ..."]:
        """Return the inverse of `input_to_param`."""
        if self.weight.pattern is None:
            return a.T
        _, inputs, our_inputs, _ = self._sides()
        return self._side(f"rank {inputs} -> {our_inputs} rank").to_checkpoint(a)

    def output_to_param(self, b: Float[np.ndarray, "o r ..."]) -> Float[np.ndarray, "r o"]:
        """Return the second matrix of the file, [outputs, rank, ...], as [rank, outputs] in jvlm's order."""
        b = b.reshape(b.shape[:2])
        if self.weight.pattern is None:
            return b.T
        outputs, _, _, ours = self._sides()
        return self._side(f"{outputs} rank -> rank {ours}").to_param(b)

    def output_to_checkpoint(self, b: Float[np.ndarray, "r o"]) -> Float[np.ndarray, "o r ..."]:
        """Return the inverse of `output_to_param`: [outputs, rank, 1, ...] with the axes of a convolution's weight."""
        if self.weight.pattern is None:
            return b.T
        outputs, _, _, ours = self._sides()
        value = self._side(f"{outputs} rank -> rank {ours}").to_checkpoint(b)
        return value.reshape(*value.shape, *self._window)

    def vector_to_param(self, value: Float[np.ndarray, "..."]) -> Float[np.ndarray, " o"]:
        """Return a number for each output, of the file, as [outputs] in jvlm's order."""
        value = value.reshape(-1)
        if self.weight.pattern is None:
            return value
        outputs, _, _, ours = self._sides()
        return self._side(f"{outputs} -> {ours}").to_param(value)

    def vector_to_checkpoint(self, value: Float[np.ndarray, " o"]) -> Float[np.ndarray, " o"]:
        """Return the inverse of `vector_to_param`, [outputs]."""
        if self.weight.pattern is None:
            return value
        outputs, _, _, ours = self._sides()
        return self._side(f"{outputs} -> {ours}").to_checkpoint(value)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes in a file of an adapter's parts, by the end of their names."""
        shape = self.weight.shape
        if self.kind == "embedding":
            names = {"lora_embedding_A": (rank, shape[0]), "lora_embedding_B": (shape[1], rank)}
        else:
            names = {"lora_A.weight": (rank, *shape[1:]), "lora_B.weight": (shape[0], rank, *self._window)}
        window = self._window
        magnitude = (1, self.d_out, *window) if window else (self.d_out,)
        return {**names, "lora_magnitude_vector": magnitude, "lora_B.bias": (self.d_out,)}

    @property
    def _window(self) -> tuple[int, ...]:
        return (1,) * (len(self.weight.shape) - 2)

    def _side(self, pattern: str) -> Entry:
        return dataclasses.replace(self.weight, pattern=pattern)

    def _sides(self) -> tuple[str, str, str, str]:
        """Return outputs and inputs of the file, inputs and outputs of the parameter, as terms of einops."""
        left, right = (re.findall(r"\([^)]*\)|\S+", side) for side in self.weight.pattern.split(" -> "))
        return left[0], " ".join(left[1:]), " ".join(right[:-1]), right[-1]


def target_of(entry: Entry) -> Target:
    """Return the parameter, or the layer of one, that a tensor is."""
    return Target(entry.path, () if entry.layer is None else (entry.layer,))


def untied(config: VLMConfig) -> VLMConfig:
    """Return the configuration with a head of its own."""
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_word_embeddings=False))


def entries(config: VLMConfig) -> tuple[Entry, ...]:
    """Return the tensors of a model in table order. Raises WeightError where its family has no Hugging Face form."""
    table.export_format(config)
    # what neither names nor shapes depend on
    return _entries(dataclasses.replace(config, precision=Precision()))


@functools.lru_cache(maxsize=8)
def _entries(config: VLMConfig) -> tuple[Entry, ...]:
    shapes = vlm.parameter_shapes(config)
    return tuple(table.entries(config, shapes))


def modules(config: VLMConfig) -> dict[str, Module]:
    """Return the modules with a weight by name. A tied model has its head too: adapters untie it."""
    tensors = {entry.name: entry for entry in entries(untied(config))}
    result = {}
    for name, entry in tensors.items():
        module, dot, part = name.rpartition(".")
        if dot and part == "weight":
            result[module] = Module(module, _kind(entry), entry, tensors.get(f"{module}.bias"))
    return result


def _kind(entry: Entry) -> Literal["linear", "conv", "embedding", "other"]:
    if entry.path == EMBEDDING:
        return "embedding"
    if not entry.path.endswith(".kernel"):
        return "other"
    return "linear" if len(entry.shape) == 2 else "conv"


def is_head(module: Module) -> bool:
    """Return whether a module gives the logits."""
    return module.weight.path == HEAD


def renamed(config: VLMConfig, layout: Layout, name: str) -> str:
    """Return a module's name, given in the weight table's spelling, in a layout."""
    return table.hf_format(config).layouts[LAYOUTS[layout]](f"{name}.weight").removesuffix(".weight")


def containers(names: set[str]) -> set[str]:
    """Return the modules that hold other modules."""
    return {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts))}


def shortest_suffixes(chosen: set[str], others: set[str]) -> list[str]:
    """Return ends of names, sorted, that match the chosen ones and none of the others; whole words of a name.

    An end begins with a word and not with a number: "2" is the end of a layer's name too.
    """
    suffixes: set[str] = set()
    forbidden = {suffix for name in others for suffix in _suffixes(name)}
    for name in sorted(chosen):
        fitting = [s for s in _suffixes(name) if s not in forbidden and not s.split(".")[0].isdigit()]
        suffixes.add(fitting[0] if fitting else name)
    return sorted(suffixes)


def _suffixes(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[-n:]) for n in range(1, len(words) + 1)]
