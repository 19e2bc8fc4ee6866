"""Writing a PEFT folder that PEFT, transformers, vLLM and SGLang of any age read."""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.adapters import peft_card, peft_config, peft_experts, peft_modules
from jvlm.adapters.peft_experts import ExpertParameter
from jvlm.adapters.peft_modules import LAYOUTS, Layout, Module, target_of
from jvlm.adapters.peft_read import MAGNITUDE, PREFIX, TENSORS, TOKEN_ROWS
from jvlm.adapters.weights import AdapterWeights, LowRank, Target
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.weights import safetensors_files, table
from jvlm.weights.table import Entry
from jvlm.weights.vocabulary import EMBEDDING, HEAD

# The keys written are those of this version, which later ones read too; an earlier one warns of keys it does not know.
PEFT_VERSION = "0.15.2"
# That of a file with adapters of experts' parameters, which 0.15 does not have.
PEFT_VERSION_OF_EXPERTS = "0.21.2"
_SUFFIX = {"lora_A.weight": "a", "lora_embedding_A": "a", "lora_B.weight": "b", "lora_embedding_B": "b"}


def write_peft(
    weights: AdapterWeights,
    config: VLMConfig,
    folder: str | Path,
    *,
    layout: Layout = "new",
    base_name: str | None = None,
    dtype: str | None = None,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, where there is none, a model card.

    Args:
      config: of the base.
      folder: made if need be; the files of an adapter that is there already are replaced.
      layout: names of modules, "new" as in transformers >= 4.52, "old" as before. Idefics2 has the same in both.
      base_name: id on the Hub, or folder, of the base: base_model_name_or_path. The card names it if it is an id.
      dtype: of all tensors; None writes each as it is given.

    Raises:
      UserError: what PEFT's files cannot express, with everything that is concerned.
      WeightError: a family without a Hugging Face form.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    writer = _Writer(weights, config, layout)
    tensors, settings = writer.tensors(), writer.settings(base_name)
    if writer.problems:
        lines = "\n  ".join(writer.problems)
        raise UserError(f"a PEFT folder cannot hold this adapter ({len(writer.problems)} problems):\n  {lines}")
    wanted = None if dtype is None else safetensors_files.dtype_of(dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(value.nbytes for value in tensors.values())
    safetensors_files.write(
        folder,
        [(key, wanted or v.dtype, v.shape, lambda v=v: v) for key, v in sorted(tensors.items())],
        max_shard_bytes=8 * size + 1,  # one file, whatever the dtype
        single_name=TENSORS,
    )
    if not (folder / peft_card.FILE).exists():
        (folder / peft_card.FILE).write_text(peft_card.text(weights, config, base_name))
    beside = folder / f"{peft_config.FILE}.partial"
    beside.write_text(json.dumps(settings, indent=2) + "\n")
    beside.replace(folder / peft_config.FILE)


class _Writer:
    """One adapter in one layout; ``problems`` grows as its parts are laid out."""

    def __init__(self, weights: AdapterWeights, config: VLMConfig, layout: Layout):
        self.weights, self.config, self.layout = weights, config, layout
        self.problems: list[str] = []
        if weights.config.init in ("pissa", "olora"):
            self.problems.append(f"init {weights.config.init!r} changed the base: convert it to plain LoRA first")
        self.names = {n: peft_modules.renamed(config, layout, n) for n in peft_modules.modules(config)}
        self.modules = {self.names[n]: module for n, module in peft_modules.modules(config).items()}
        by_target = {module.target: name for name, module in self.modules.items()}
        rename = table.export_format(config).layouts[LAYOUTS[layout]]
        tensors = peft_modules.entries(peft_modules.untied(config))
        self.entries: dict[str, Entry] = {rename(entry.name): entry for entry in tensors}
        names = {target_of(entry): name for name, entry in self.entries.items()}
        experts = self._adapted_experts()
        of_experts = {target for parameter in experts for row in parameter.targets() for target in row}
        plain = [target for target in weights.low_rank if target not in of_experts]
        unknown = [t for t in plain if t not in by_target or self.modules[by_target[t]].kind == "other"]
        unknown += [t for t in weights.parameters if t not in names]
        self.problems += [f"no module for {target.path} {list(target.index)}" for target in unknown]
        self.low_rank = {by_target[t]: weights.low_rank[t] for t in plain if t not in unknown}
        self.experts = {rename(p.name): peft_experts.pack(p, weights.low_rank) for p in experts}
        self.wrappers = {rename(name): rename(wrapper) for name, wrapper in peft_experts.wrappers(experts).items()}
        self.whole = {names[t]: value for t, value in weights.parameters.items() if t not in unknown}
        if config.decoder.tie_word_embeddings and Target(EMBEDDING) in weights.parameters:
            # alone, PEFT would take it as the embedding's only
            self.whole.setdefault(names[Target(HEAD)], weights.parameters[Target(EMBEDDING)].T)
        self.biases = self._biases()
        self.rows = {by_target[target_of(self._of_path(path))]: rows for path, rows in weights.token_rows.items()}

    def _adapted_experts(self) -> list[ExpertParameter]:
        """Return the parameters of experts that have adapters, after noting what PEFT does not have beside them."""
        targets = self.weights.low_rank.keys()
        every = peft_experts.parameters(self.config).values()
        whole = [p.name for p in every if any(target_of(part) in self.weights.parameters for part in p.parts)]
        self.problems += [
            f"{name} is trained whole, and versions of transformers keep it in different orders: merge the adapter"
            for name in whole
        ]
        adapted = [p for p in every if any(target in targets for row in p.targets() for target in row)]
        if not adapted:
            return []
        if self.layout == "old":
            self.problems.append(
                "layout 'old' is for PEFT before 0.17, which has no adapters of experts: write the layout 'new', or "
                "merge the adapter"
            )
        if self.weights.config.dropout:
            self.problems.append("PEFT has no dropout in an adapter that has experts: set dropout to 0")
        if self._any("magnitude") or self._any("bias"):
            self.problems.append(
                "PEFT has neither use_dora nor lora_bias in an adapter that has experts: merge the adapter instead"
            )
        return adapted

    def _of_path(self, path: str) -> Entry:
        return next(entry for entry in self.entries.values() if entry.path == path)

    def _biases(self) -> set[str]:
        """Whole tensors that ``bias`` accounts for: not those of modules that are saved whole."""
        if self.weights.config.bias == "none":
            return set()
        of_modules = (name for name in self.whole if name.endswith(".bias"))
        return {name for name in of_modules if f"{name.removesuffix('.bias')}.weight" not in self.whole}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors of the file by key."""
        result = {}
        for name, low in self.low_rank.items():
            for part, value in self._parts(name, self.modules[name], low).items():
                result[f"{PREFIX}{name}.{part}"] = value
        for name, packed in self.experts.items():
            result[f"{PREFIX}{self.wrappers[name]}.lora_A.weight"] = packed.lora_a
            result[f"{PREFIX}{self.wrappers[name]}.lora_B.weight"] = packed.lora_b
        for name, value in self.whole.items():
            module, _, part = name.rpartition(".")
            key = f"{module}.base_layer.{part}" if module in self.low_rank else name
            result[PREFIX + key] = self.entries[name].to_checkpoint(value)
        for name, rows in self.rows.items():
            result[f"{PREFIX}{name}.{TOKEN_ROWS}"] = rows.rows
        return {key: np.ascontiguousarray(value) for key, value in result.items()}

    def _parts(self, name: str, module: Module, low: LowRank) -> dict[str, np.ndarray]:
        given = {
            "a": module.input_to_checkpoint(low.a),
            "b": module.output_to_checkpoint(low.b),
            MAGNITUDE: low.magnitude,
            "lora_B.bias": low.bias,
        }
        if low.magnitude is None and self._any("magnitude"):
            self.problems.append(f"{name} has no magnitude, and other modules have one: use_dora counts for all")
        if low.bias is not None and module.bias is None:
            self.problems.append(f"{name} has a bias in its adapter, and none in the base, which PEFT wants")
        if low.bias is None and self._any("bias") and module.bias is not None:
            given["lora_B.bias"] = np.zeros(module.d_out, low.b.dtype)
        parts = {}
        for part, shape in module.shapes(low.rank).items():
            value = given[_SUFFIX.get(part, part)]
            if value is None:
                continue
            vector = part in (MAGNITUDE, "lora_B.bias")
            parts[part] = (module.vector_to_checkpoint(value) if vector else value).reshape(shape)
        return parts

    def _any(self, part: str) -> bool:
        return any(getattr(low, part) is not None for low in self.weights.low_rank.values())

    def settings(self, base_name: str | None) -> dict[str, Any]:
        """adapter_config.json."""
        rank, alpha = self._usual()
        version = PEFT_VERSION_OF_EXPERTS if self.experts else PEFT_VERSION
        patterns = self._patterns(rank, alpha)
        form = table.export_format(self.config).write_config(self.config)
        architecture, kind = form["architectures"][0], form["model_type"]
        return {
            "alpha_pattern": {key: _number(a) for key, (_, a) in patterns.items() if a != alpha},
            "auto_mapping": {
                "base_model_class": architecture,
                "parent_library": f"transformers.models.{kind}.modeling_{kind}",
            },
            "base_model_name_or_path": base_name,
            "bias": self.weights.config.bias,
            "corda_config": None,
            "eva_config": None,
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layer_replication": None,
            "layers_pattern": None,
            "layers_to_transform": None,
            "loftq_config": {},
            "lora_alpha": _number(alpha),
            "lora_bias": self._any("bias"),
            "lora_dropout": self.weights.config.dropout,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "modules_to_save": self._modules_to_save() or None,
            "peft_type": "LORA",
            # 0.15, which reads the old layout, does not know the key
            **({"peft_version": version} if self.layout == "new" else {}),
            "r": rank,
            "rank_pattern": {key: r for key, (r, _) in patterns.items() if r != rank},
            "revision": None,
            "target_modules": self._target_modules(),
            **({"target_parameters": self._target_parameters()} if self.experts else {}),
            "task_type": None,
            "trainable_token_indices": self._token_indices() or None,
            "use_dora": self._any("magnitude"),
            "use_rslora": self.weights.config.use_rslora,
        }

    def _sizes(self) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each module and parameter."""
        sizes = {name: (low.rank, self._alpha(low)) for name, low in self.low_rank.items()}
        # of rsLoRA, roots come and go: 5 / sqrt(2) * sqrt(2) is 5
        alphas = {name: round(p.scale * self._divisor(p.rank), 12) for name, p in self.experts.items()}
        return sizes | {name: (p.rank, alphas[name]) for name, p in self.experts.items()}

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.weights.config.use_rslora else rank

    def _alpha(self, low: LowRank) -> float:
        divisor = self._divisor(low.rank)
        return low.alpha if math.isclose(low.alpha / divisor, low.scale, rel_tol=1e-12) else low.scale * divisor

    def _usual(self) -> tuple[int, float]:
        """Return the configuration's rank and alpha, or where no module has them, the most frequent ones."""
        sizes = collections.Counter(self._sizes().values())
        given = (self.weights.config.rank, self.weights.config.alpha)
        return given if given in sizes or not sizes else sizes.most_common(1)[0][0]

    def _patterns(self, rank: int, alpha: float) -> dict[str, tuple[int, float]]:
        """Regular expressions of names, with what the modules have that do not have the usual rank and alpha."""
        sizes, patterns = self._sizes(), {}
        for name in sorted(sizes):
            if sizes[name] == (rank, alpha):
                continue
            others = {other for other in sizes if sizes[other] != sizes[name]}
            patterns[re.escape(peft_modules.shortest_suffixes({name}, others)[0])] = sizes[name]
        return patterns

    def _target_modules(self) -> list[str]:
        others = (self.modules.keys() | peft_modules.containers(set(self.entries))) - self.low_rank.keys()
        return peft_modules.shortest_suffixes(set(self.low_rank), others)

    def _target_parameters(self) -> list[str]:
        rename = table.export_format(self.config).layouts[LAYOUTS[self.layout]]
        every = {rename(name) for name in peft_experts.parameters(self.config)}
        others = (self.entries.keys() | every) - self.experts.keys()
        return peft_modules.shortest_suffixes(set(self.experts), others)

    def _modules_to_save(self) -> list[str]:
        """Names of modules, of which PEFT saves all tensors; none of others, which it finds by the end of the name."""
        saved = {name for name in self.whole if name not in self.biases}
        chosen = {name.rpartition(".")[0] for name in saved}
        inside = {name for name in self.entries for module in chosen if name.startswith(f"{module}.")}
        for name in sorted(inside - saved):
            self.problems.append(f"{name} is not saved, and other tensors of its module are: PEFT saves modules whole")
        for name in sorted(self.low_rank):
            if any(name == module or name.startswith(f"{module}.") for module in chosen):
                self.problems.append(f"{name} has an adapter and is saved whole")
        outermost = {m for m in chosen if not any(m.startswith(f"{other}.") for other in chosen)}
        everything = self.modules.keys() | peft_modules.containers(set(self.entries))
        return sorted({_unique_end(module, everything - {module}) for module in outermost})

    def _token_indices(self) -> dict[str, list[int]]:
        return {name.rpartition(".")[2]: [int(i) for i in rows.token_ids] for name, rows in self.rows.items()}


def _unique_end(name: str, others: Iterable[str]) -> str:
    """Return the shortest end of a name, in whole words, that no other name ends with, not even within a word."""
    others = list(others)
    words = name.split(".")
    for n in range(1, len(words) + 1):
        end = ".".join(words[-n:])
        if not words[-n].isdigit() and not any(other.endswith(end) for other in others):
            return end
    return name


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
