"""What other programs refuse or silently drop of an adapter, so that nobody serves the base by mistake.

Sources: vLLM's `vllm/lora`, SGLang 0.5's `lora`, llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.h`,
transformers 5's `PreTrainedModel.load_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from jvlm.adapters import merge, peft_experts
from jvlm.adapters.weights import AdapterWeights
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.weights.vocabulary import EMBEDDING, HEAD

Reader = Literal["vllm", "sglang", "llama.cpp", "transformers"]
READERS: tuple[Reader, ...] = get_args(Reader)
# vLLM's --max-lora-rank unless it is given.
_VLLM_RANK = 16
_MERGE = "merge the adapter instead"
_PLAIN = "write the plain form"


def reader_problems(weights: AdapterWeights, config: VLMConfig, reader: str) -> list[str]:
    """Return a line for each feature that a reader of a PEFT folder refuses or drops, with what to do; empty: none.

    Args:
      config: of the base.
      reader: "vllm", "sglang", "llama.cpp" or "transformers".

    Raises:
      UserError: another reader.
    """
    if reader not in _CHECKS:
        raise UserError(f"unknown reader {reader!r}; known: {', '.join(_CHECKS)}")
    return list(_CHECKS[reader](_Facts(weights, config)))


class _Facts:
    """What readers differ in."""

    def __init__(self, weights: AdapterWeights, config: VLMConfig):
        paths = {target.path for target in weights.low_rank}
        self.config, self.tied = config, merge.needs_own_head(weights, config)
        self.dora = any(low.magnitude is not None for low in weights.low_rank.values())
        self.lora_bias = any(low.bias is not None for low in weights.low_rank.values())
        self.whole = sorted({target.path for target in weights.parameters})
        self.rows = sorted(weights.token_rows)
        self.tables = sorted(paths & {EMBEDDING, HEAD})
        self.head = HEAD in paths
        self.vision = [target for target in weights.low_rank if not target.path.startswith("decoder.")]
        self.experts = _adapted_experts(weights, config)
        self.rank = max((low.rank for low in weights.low_rank.values()), default=0)
        self.rank = max([self.rank, *(rank for rank, _ in self.experts.values())])
        modules = [name.rpartition(".")[0] for name in self.experts]
        self.one_of_two = sorted({module for module in modules if modules.count(module) < 2})
        self.rslora = weights.config.use_rslora
        lows = list(weights.low_rank.values())
        self.scales_differ = any(not math.isclose(low.scale, lows[0].scale, rel_tol=1e-6) for low in lows)
        alphas = [low.scale * low.rank for low in lows]
        self.alphas_differ = any(not math.isclose(alpha, alphas[0], rel_tol=1e-6) for alpha in alphas)
        text = (path for path in paths if path.startswith("decoder.") and ".attention." in path)
        names = {path.rpartition(".attention.")[2].removesuffix(".kernel") for path in text}
        self.v_without_q = {"v"} <= names and "q" not in names


def _adapted_experts(weights: AdapterWeights, config: VLMConfig) -> dict[str, tuple[int, float]]:
    """Return rank and scale of each parameter of experts in a PEFT folder, by name."""
    if not any(len(target.index) > 1 for target in weights.low_rank):
        return {}
    result = {}
    for name, parameter in peft_experts.parameters(config).items():
        if any(target in weights.low_rank for row in parameter.targets() for target in row):
            packed = peft_experts.pack(parameter, weights.low_rank)
            result[name] = packed.rank, packed.scale
    return result


def _vllm(facts: _Facts) -> Iterable[str]:
    if facts.dora:
        yield f"refused: DoRA (use_dora); {_MERGE}"
    if facts.whole:
        yield f"refused: parameters saved whole (modules_to_save, bias): {', '.join(facts.whole)}; {_MERGE}"
    if facts.rows:
        yield f"refused: rows of single tokens: {', '.join(facts.rows)}; {_MERGE}"
    if facts.lora_bias:
        yield f"refused: biases of adapters (lora_bias); {_MERGE}"
    if facts.tables:
        yield f"refused: adapters of the embedding or head: {', '.join(facts.tables)}; {_MERGE}"
    if facts.rank > _VLLM_RANK:
        yield f"refused: rank {facts.rank} is above {_VLLM_RANK}; start vLLM with a larger --max-lora-rank"
    if facts.one_of_two:
        yield f"refused: experts with an adapter for gate_up_proj or down_proj alone: {facts.one_of_two[0]}; {_MERGE}"
    if facts.scales_differ:
        yield f"dropped in silence: ranks and alphas by pattern, r and lora_alpha count for all modules; {_PLAIN}"
    if facts.vision:
        yield f"ignored without enable_tower_connector_lora: {_vision(facts)}; {_MERGE}"


def _vision(facts: _Facts) -> str:
    return f"{len(facts.vision)} adapters of the vision tower and connector ({facts.vision[0].path}, ...)"


def _sglang(facts: _Facts) -> Iterable[str]:
    if facts.dora:
        yield f"refused: DoRA (use_dora); {_MERGE}"
    if facts.rows:
        yield f"refused: rows of single tokens: {', '.join(facts.rows)}; {_MERGE}"
    if facts.whole:
        yield f"dropped in silence: parameters saved whole: {', '.join(facts.whole)}; {_MERGE}"
    if facts.lora_bias:
        yield f"dropped in silence: biases of adapters (lora_bias); {_MERGE}"
    if facts.tables:
        yield f"not read: adapters of the embedding or head: {', '.join(facts.tables)}; {_MERGE}"
    if facts.rslora or facts.scales_differ:
        yield f"dropped in silence: rsLoRA, ranks and alphas by pattern, the scale is lora_alpha / r always; {_PLAIN}"
    if facts.vision:
        yield f"dropped in silence: {_vision(facts)}; {_MERGE}"
    if facts.experts:
        yield f"not known to be read: adapters of experts ({next(iter(facts.experts))}, ...); {_MERGE}"
    if facts.v_without_q:
        yield f"refused: v_proj has an adapter where q_proj has none; {_MERGE}, or train both"


def _llama_cpp(facts: _Facts) -> Iterable[str]:
    if facts.dora:
        yield f"refused: DoRA's magnitudes; {_MERGE}"
    if facts.experts:
        yield f"refused: adapters of experts ({next(iter(facts.experts))}, ...); {_MERGE}"
    if facts.head and facts.config.decoder.tie_word_embeddings:
        yield f"refused: an adapter of the head of a tied model; {_MERGE}"
    if facts.rslora or facts.alphas_differ:
        yield f"dropped in silence: rsLoRA and alphas by pattern, the scale is lora_alpha / rank; {_PLAIN}"
    if facts.whole or facts.rows or facts.lora_bias:
        named = ", ".join([*facts.whole, *facts.rows, *(["lora_bias"] if facts.lora_bias else [])])
        yield f"dropped: what no GGUF adapter holds: {named}; {_MERGE}"
    if facts.vision:
        yield f"dropped in silence, an mmproj file has none: {_vision(facts)}; {_MERGE}, and export mmproj with it"


def _transformers(facts: _Facts) -> Iterable[str]:
    if facts.experts:
        yield (
            "refused by a PEFT and a transformers of different age: adapters of experts fit PEFT >= 0.20 with "
            f"transformers 5; elsewhere {_MERGE}"
        )
    if facts.dora:
        yield (
            "dropped: load_adapter of transformers 5 loses DoRA's magnitudes; load with peft's "
            f"PeftModel.from_pretrained, or {_MERGE}"
        )
    if facts.tied:
        yield (
            "wrong once merged: merge_and_unload of PEFT adds to the matrix that embedding and head share; "
            f"{_MERGE} with jvlm, which gives the head a matrix of its own"
        )
    if facts.lora_bias:
        yield f"wrong once merged: PEFT before 0.16 merges lora_bias without its scale; {_MERGE} with jvlm"


_CHECKS: dict[str, Callable[[_Facts], Iterable[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
