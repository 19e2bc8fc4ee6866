"""A LoRA adapter of the language model as a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.adapters.weights import AdapterWeights, LowRank, Target
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.weights.gguf_export import files, text
from jvlm.weights.gguf_export.files import Tensor, Written
from jvlm.weights.vocabulary import EMBEDDING


def write_lora(weights: AdapterWeights, config: VLMConfig, path: Path, *, text_only: bool = False) -> Written:
    """Write an adapter, in float32. llama.cpp scales each pair of matrices by alpha / its rank.

    Where that is not what the adapter was trained with (rsLoRA, alphas by pattern), the scale is folded into the second
    matrix, times the rank, and alpha is 1.

    Args:
      config: of the base.
      text_only: leave out adapters of the vision tower and connector, which llama.cpp cannot load, and say how many.

    Raises:
      UserError: what llama.cpp cannot load, all of it listed: merge it into the base then.
    """
    text.checked(config)
    outside = sorted(target for target in weights.low_rank if not target.path.startswith("decoder."))
    inside = {target: low for target, low in sorted(weights.low_rank.items()) if target not in outside}
    problems = {
        "not of the language model": [] if text_only else [target.path for target in outside],
        "of experts": [target.path for target in inside if len(target.index) > 1],
        "an embedding table": [target.path for target in inside if target.path == EMBEDDING],
        "DoRA's magnitude": [target.path for target, low in inside.items() if low.magnitude is not None],
        "a bias of the adapter": [target.path for target, low in inside.items() if low.bias is not None],
        "trained whole": [target.path for target in sorted(weights.parameters)],
        "rows of tokens": sorted(weights.token_rows),
    }
    lines = [f"{kind}: {len(paths)}, first {paths[0]}" for kind, paths in problems.items() if paths]
    if not inside:
        lines.append("no matrix of the language model has an adapter")
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(
            "llama.cpp cannot load this adapter; merge it into its base (jvlm export --merge_lora true), and export "
            f"that:\n  {listed}"
        )
    if outside:
        towers = sorted({target.path.partition(".")[0] for target in outside})
        print(f"left out: {len(outside)} adapters of {' and '.join(towers)}, which llama.cpp cannot load")
    alpha = _common_alpha(inside)

    def keys(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0 if alpha is None else alpha)

    return files.write(path, text.architecture(config), keys, _tensors(inside, config, alpha), None)


def _common_alpha(low_rank: dict[Target, LowRank]) -> float | None:
    """Return the alpha for which alpha / rank is the scale of each; None if there is no such alpha."""
    first = next(iter(low_rank.values()))
    alpha = first.scale * first.rank
    same = all(math.isclose(low.scale * low.rank, alpha, rel_tol=1e-6) for low in low_rank.values())
    return alpha if same else None


def _tensors(low_rank: dict[Target, LowRank], config: VLMConfig, alpha: float | None) -> Iterator[Tensor]:
    for target, low in low_rank.items():
        name = text.tensor_name(target.path, target.index[0] if target.index else None)
        a, b = np.asarray(low.a, np.float32).T, np.asarray(low.b, np.float64).T
        if alpha is None:
            b = b * (low.scale * low.rank)
        heads = text.rotary_heads(config, target.path)
        if heads:
            b = text.side_by_side(b, heads)
        yield Tensor(f"{name}.lora_a", a.shape, lambda a=a: a)
        yield Tensor(f"{name}.lora_b", b.shape, lambda b=b: b)
