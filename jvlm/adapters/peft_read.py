"""Reading a PEFT folder: every target has its tensors and every tensor its target, or nothing is read.

PEFT and transformers only warn of a key that fits no module, and then answer as the base does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from jvlm.adapters import neutral, peft_config, peft_experts, peft_modules
from jvlm.adapters.peft_config import PeftConfig
from jvlm.adapters.peft_experts import ExpertParameter
from jvlm.adapters.peft_modules import Layout, target_of
from jvlm.adapters.weights import AdapterWeights, LowRank, Target, TokenRows
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.weights import table
from jvlm.weights.table import WeightError
from jvlm.weights.vocabulary import EMBEDDING, HEAD

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"
_DTYPES = ("F64", "F32", "F16", "BF16")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?|lora_embedding_[AB]|"
    r"token_adapter\.trainable_tokens_delta|(?:token_adapter\.)?base_layer\.(?:weight|bias))"
)
ReadBase = Callable[[Target], np.ndarray]
_UNCONVERTED = (
    "the tensors belong to a base that init_lora_weights = {init!r} has changed: {hint}save the adapter again in PEFT "
    "with path_initial_model_for_weight_conversion, and read that folder"
)


def find_folder(folder: str | Path) -> Path:
    """Return the folder of the one adapter that is in a folder or in a sub-folder of it.

    Raises:
      UserError: there is none, or there are several, which are named.
    """
    folder = Path(folder)
    if (folder / peft_config.FILE).is_file():
        return folder
    folders = sorted(path.parent for path in folder.glob(f"*/{peft_config.FILE}"))
    if len(folders) == 1:
        return folders[0]
    if folders:
        names = ", ".join(path.name for path in folders)
        raise UserError(f"{folder} has adapters in several sub-folders: {names}; give one of them")
    raise UserError(f"{folder} has no {peft_config.FILE}: give the folder of an adapter")


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter, and no model."""
    return (Path(folder) / peft_config.FILE).is_file() and not (Path(folder) / "config.json").is_file()


def read_peft(folder: str | Path, config: VLMConfig, *, read_base: ReadBase | None = None) -> AdapterWeights:
    """Return the adapter of a PEFT folder, in the dtypes of the file. Both layouts of names are read.

    Args:
      config: of the base. An adapter of a tied model's head or embedding untied it: ``decoder.head.kernel`` is then a
        target that the tied model does not have.
      read_base: gives a parameter of the base, kernels as [in, out]; needed for an adapter that was saved as PiSSA or
        OLoRA made it, and for one that replaces a tied embedding and leaves the head as it was.

    Raises:
      UserError: no adapter, a feature that is not read, or a base that is needed.
      WeightError: tensors without a target, targets without tensors, wrong shapes; all of them are listed.
    """
    folder = find_folder(folder)
    settings = peft_config.read(folder / peft_config.FILE)
    init = settings.init_lora_weights
    if peft_config.changes_base(settings) and (init not in neutral.INITS or read_base is None):
        hint = "give the folder of the base, or " if init in neutral.INITS else ""
        raise UserError(f"{settings.path}: " + _UNCONVERTED.format(init=init, hint=hint))
    path = folder / TENSORS
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("adapter_model.*"))
        hint = f"; {others[0]} is not read: save it with PEFT >= 0.5, which writes safetensors" if others else ""
        raise UserError(f"{path} is missing{hint}")
    try:
        with safe_open(path, framework="numpy") as tensors:
            weights = _Reader(settings, config, tensors, read_base).weights()
    except SafetensorError as error:
        raise WeightError(f"{path} is not a readable safetensors file ({error}); copy it again") from error
    return neutral.subtract_initial(weights, init, read_base) if peft_config.changes_base(settings) else weights


class _Reader:
    """One file: its keys matched with the modules of a model, before any tensor is read."""

    def __init__(self, settings: PeftConfig, config: VLMConfig, tensors: Any, read_base: ReadBase | None):
        self.settings, self.config, self.tensors, self.read_base = settings, config, tensors, read_base
        self.form = table.hf_format(config)
        self.modules = peft_modules.modules(config)
        self.entries = {e.name: e for e in peft_modules.entries(peft_modules.untied(config))}
        self.problems: list[str] = []
        self.parts: dict[str, dict[str, str]] = {}
        self.experts = peft_experts.parameters(config)
        self.expert_modules = {parameter.module for parameter in self.experts.values()}
        # of a module of experts, or of a wrapper inside its adapter
        self.expert_parts: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        self.layout: Layout = "new"
        for key in tensors.keys():  # noqa: SIM118  (not a dict)
            self._sort(key)

    def _sort(self, key: str) -> None:
        """Put a key to the part of a module, or to the tensor, that it names."""
        dtype = self.tensors.get_slice(key).get_dtype()
        if dtype not in _DTYPES:
            self.problems.append(f"dtype {dtype} is not read: {key}")
        name = key.removeprefix(PREFIX)
        match = _PART.fullmatch(name)
        stored = match["module"] if match else name
        if match and self._is_wrapper(stored):
            self.expert_parts.setdefault(stored, {})[match["part"]] = key
            return
        tensor = self.form.canonical(f"{stored}.weight" if match else stored)
        if tensor not in self.entries:
            self.problems.append(f"the model has no such module: {key}")
            return
        written = f"{stored}.weight" if match else stored
        if written != self.form.layouts[peft_modules.LAYOUTS["new"]](tensor):
            self.layout = "old"
        if match is None:
            self.whole[tensor] = key
            return
        module, part = tensor.removesuffix(".weight"), match["part"].removesuffix(".weight")
        if part.endswith("base_layer.bias"):
            if self.settings.bias != "none":
                self.whole[f"{module}.bias"] = key
        elif not part.endswith("base_layer"):  # the base's own matrix, which PEFT repeats
            self.parts.setdefault(module, {})[part] = key

    def _is_wrapper(self, stored: str) -> bool:
        """Return whether a module holds the adapter of a parameter of experts."""
        module = re.sub(r"(\.base_layer)+$", "", stored)
        return (self.form.canonical(f"{module}.weight") or "").removesuffix(".weight") in self.expert_modules

    def weights(self) -> AdapterWeights:
        adapted = {name for name, parts in self.parts.items() if set(parts) - {TOKEN_ROWS}}
        self._check_targets(adapted)
        low_rank = {self.modules[n].target: pair for n in sorted(adapted) if (pair := self._low_rank(n)) is not None}
        low_rank |= self._expert_low_rank()
        parameters = self._parameters(adapted)
        token_rows = self._token_rows(adapted)
        if self.problems:
            lines = "\n  ".join(sorted(self.problems))
            raise WeightError(
                f"{self.settings.path.parent} does not fit its configuration and this model "
                f"({len(self.problems)} problems):\n  {lines}"
            )
        if self.config.decoder.tie_word_embeddings:
            self._share(parameters)
        return AdapterWeights(self.settings.adapter_config(), low_rank, parameters, token_rows)

    def _share(self, parameters: dict[Target, np.ndarray]) -> None:
        """Settle what a whole embedding of a tied model means for the head.

        One that is saved alone unties the model in PEFT, and the head stays as it was. Saved twice, or without being in
        modules_to_save (new tokens made it longer), it is the table of both.
        """
        table, head = parameters.get(Target(EMBEDDING)), parameters.get(Target(HEAD))
        if table is None:
            return
        if head is not None and np.array_equal(head.T, table):
            del parameters[Target(HEAD)]
        elif head is None and self._is_saved(next(n for n, e in self.entries.items() if e.path == EMBEDDING)):
            if self.read_base is None:
                raise UserError(
                    f"{self.settings.path}: modules_to_save replaces the embedding of a tied model and leaves the head "
                    "as it was: give the folder of the base"
                )
            parameters[Target(HEAD)] = self.read_base(Target(EMBEDDING)).T

    def _check_targets(self, adapted: set[str]) -> None:
        """Compare what the configuration names with what the file has, under the names of either layout."""
        # transformers < 5 renames an old file's keys when it loads it, and its settings stay as they were
        other: Layout = "old" if self.layout == "new" else "new"
        targets = self._targets(self.layout)
        if targets != adapted and self._targets(other) == adapted:
            self.layout, targets = other, adapted
        self.problems += [f"target without tensors: {self._written(name)}" for name in targets - adapted]
        self.problems += [
            f"tensors without a target: {key}" for name in adapted - targets for key in self.parts[name].values()
        ]

    def _targets(self, layout: Layout) -> set[str]:
        named = ((n, peft_modules.renamed(self.config, layout, n), m) for n, m in self.modules.items())
        return {name for name, written, module in named if self.settings.is_target(written, module)}

    def _written(self, module: str) -> str:
        return peft_modules.renamed(self.config, self.layout, module)

    def _low_rank(self, name: str) -> LowRank | None:
        """Return the adapter of one module; None after noting what is wrong with it."""
        module, written = self.modules[name], self._written(name)
        if module.kind == "other":
            self.problems.append(f"a module of this kind takes no adapter: {written}")
            return None
        rank = self.settings.rank(written)
        shapes = {key.removesuffix(".weight"): shape for key, shape in module.shapes(rank).items()}
        if not self.settings.use_dora:
            del shapes[MAGNITUDE]
        if not self.settings.lora_bias:
            del shapes["lora_B.bias"]
        if not self._have_shapes(name, shapes):
            return None
        value = {part: self.tensors.get_tensor(self.parts[name][part]) for part in shapes}
        a, b = (next(v for part, v in value.items() if part.endswith(end)) for end in ("_A", "_B"))
        vectors = (value.get(part) for part in (MAGNITUDE, "lora_B.bias"))
        magnitude, bias = (None if v is None else module.vector_to_param(v) for v in vectors)
        return LowRank(
            module.input_to_param(a),
            module.output_to_param(b),
            self.settings.scale(written),
            float(self.settings.alpha(written)),
            magnitude,
            bias,
        )

    def _expert_low_rank(self) -> dict[Target, LowRank]:
        """Return the adapters of experts' parameters; what is wrong with them is noted."""
        names = {name: self._written_tensor(name) for name in self.experts}
        for entry in self.settings.target_parameters:
            if not any(f".{name}".endswith(f".{entry}") for name in names.values()):
                self.problems.append(
                    f"target_parameters {entry!r} names no parameter of experts, and those of other modules are not "
                    "read: merge the adapter in PEFT (merge_and_unload)"
                )
        adapted = [p for name, p in self.experts.items() if self.settings.is_target_parameter(names[name])]
        parts, found = dict(self.expert_parts), []
        for name, wrapper in peft_experts.wrappers(adapted).items():
            keys, parameter, rank = parts.pop(wrapper, {}), self.experts[name], self.settings.rank(names[name])
            lacking = [part for part in ("lora_A.weight", "lora_B.weight") if part not in keys]
            self.problems += [f"missing: {names[name]}, {PREFIX}{wrapper}.{part}" for part in lacking]
            self.problems += [f"unexpected beside experts: {key}" for part, key in keys.items() if "lora_m" in part]
            if not lacking:
                a, b = keys["lora_A.weight"], keys["lora_B.weight"]
                found.append((parameter, rank, a, b))
        self.problems += [f"tensors without a target: {key}" for keys in parts.values() for key in keys.values()]
        shapes = [(p, rank, *(tuple(self.tensors.get_slice(k).get_shape()) for k in keys)) for p, rank, *keys in found]
        orders = peft_experts.orders(shapes)
        if len(orders) != 1:
            self.problems += [self._wrong_order(*shape, ambiguous=bool(orders)) for shape in shapes]
            return {}
        result: dict[Target, LowRank] = {}
        for parameter, rank, *keys in found:
            name = names[parameter.name]
            a, b = (self.tensors.get_tensor(key) for key in keys)
            packed = peft_experts.Packed(a, b, rank, self.settings.scale(name))
            result |= peft_experts.unpack(parameter, packed, swapped=orders[0], use_rslora=self.settings.use_rslora)
        return result

    def _wrong_order(
        self, parameter: ExpertParameter, rank: int, a: tuple[int, ...], b: tuple[int, ...], *, ambiguous: bool
    ) -> str:
        name = self._written_tensor(parameter.name)
        if ambiguous:
            return (
                f"{name} has as many inputs as outputs ({parameter.d_in}), so that the file does not say which of its "
                "matrices meets the inputs: merge the adapter in PEFT (merge_and_unload)"
            )
        expected = " or ".join(str(parameter.shapes(rank, swapped=swapped)) for swapped in (False, True))
        return f"wrong shape: lora_A and lora_B of {name} are {(a, b)}, expected {expected}"

    def _have_shapes(self, name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
        parts = {part: key for part, key in self.parts[name].items() if part != TOKEN_ROWS}
        actual = {part: tuple(self.tensors.get_slice(key).get_shape()) for part, key in parts.items()}
        lines = [f"missing: {self._written(name)}.{part} {shapes[part]}" for part in shapes if part not in actual]
        lines += [f"unexpected by the configuration: {parts[part]}" for part in actual if part not in shapes]
        lines += [
            f"wrong shape: {parts[part]} is {actual[part]}, expected {shapes[part]}"
            for part in shapes
            if part in actual and actual[part] != shapes[part]
        ]
        self.problems += lines
        return not lines

    def _parameters(self, adapted: set[str]) -> dict[Target, np.ndarray]:
        """Whole tensors: of saved modules, biases, and tables that new tokens have made longer."""
        expected = {name for name in self.entries if self._is_saved(name)}
        biases = {name for name in self.entries if name.endswith(".bias")}
        allowed = {name for name, entry in self.entries.items() if entry.path in (EMBEDDING, HEAD)} | expected
        if self.settings.bias == "all":
            expected, allowed = expected | biases, allowed | biases
        elif self.settings.bias == "lora_only":
            allowed |= {name for name in biases if name.removesuffix(".bias") in adapted}
        self.problems += [
            f"saved module without a tensor: {self._written_tensor(n)}" for n in expected - set(self.whole)
        ]
        self.problems += [f"tensors without a target: {key}" for n, key in self.whole.items() if n not in allowed]
        result = {}
        for name in sorted(self.whole.keys() & allowed):
            entry, key = self.entries[name], self.whole[name]
            shape = tuple(self.tensors.get_slice(key).get_shape())
            if shape != entry.shape:
                self.problems.append(f"wrong shape: {key} is {shape}, expected {entry.shape}")
            else:
                result[target_of(entry)] = entry.to_param(self.tensors.get_tensor(key))
        return result

    def _is_saved(self, tensor: str) -> bool:
        return self.settings.is_saved(self._written_tensor(tensor).rpartition(".")[0])

    def _written_tensor(self, tensor: str) -> str:
        return self.form.layouts[peft_modules.LAYOUTS[self.layout]](tensor)

    def _token_rows(self, adapted: set[str]) -> dict[str, TokenRows]:
        wanted = {
            name: ids
            for entry, ids in self.settings.trainable_token_indices.items()
            for name in self.modules
            if f".{self._written(name)}".endswith(f".{entry}")
        }
        having = {name: parts[TOKEN_ROWS] for name, parts in self.parts.items() if TOKEN_ROWS in parts}
        self.problems += [f"target without tensors: {self._written(n)}.{TOKEN_ROWS}" for n in wanted.keys() - having]
        self.problems += [f"tensors without a target: {having[n]}" for n in having.keys() - wanted]
        result = {}
        for name in sorted(wanted.keys() & having):
            module, ids, key = self.modules[name], np.asarray(wanted[name], np.int64), having[name]
            vocabulary, width = module.weight.shape
            shape = tuple(self.tensors.get_slice(key).get_shape())
            if module.weight.path not in (EMBEDDING, HEAD) or name in adapted:
                self.problems.append(f"single rows are read of an embedding or head without other adapters: {key}")
            elif shape != (len(ids), width):
                self.problems.append(f"wrong shape: {key} is {shape}, expected {(len(ids), width)}")
            elif len(set(wanted[name])) != len(ids) or not all(0 <= i < vocabulary for i in wanted[name]):
                self.problems.append(f"token ids must differ and lie in [0, {vocabulary}): {wanted[name]} of {key}")
            else:
                result[module.weight.path] = TokenRows(ids, self.tensors.get_tensor(key))
        return result
