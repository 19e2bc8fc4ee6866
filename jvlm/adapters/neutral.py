"""Adapters rewritten as plain LoRA, which every reader takes: one rank, a scale of one, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jvlm.adapters import initial
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.weights import AdapterWeights, LowRank, Target
from jvlm.errors import UserError

# Initialisations that take a part of the base away, and that can be computed again from it.
INITS = ("pissa", "olora")


def plain(weights: AdapterWeights) -> AdapterWeights:
    """Return an adapter with the scale folded into the second matrix, alpha = rank, and all ranks padded to one.

    The products are the same, to the rounding of float32. Readers that divide alpha by the rank, whatever the
    configuration says of rsLoRA, ranks and alphas by pattern, then compute what was trained.

    Raises:
      UserError: DoRA, which no plain LoRA can express.
    """
    if any(low.magnitude is not None for low in weights.low_rank.values()):
        raise UserError("a DoRA adapter has no plain form: merge it into its base")
    rank = max((low.rank for low in weights.low_rank.values()), default=weights.config.rank)
    low_rank = {target: _folded(low, rank) for target, low in weights.low_rank.items()}
    return dataclasses.replace(weights, config=_plain_config(weights, rank), low_rank=low_rank)


def _plain_config(weights: AdapterWeights, rank: int) -> AdapterConfig:
    return dataclasses.replace(
        weights.config,
        rank=rank,
        alpha=float(rank),
        use_rslora=False,
        init="default",
        rank_pattern=(),
        alpha_pattern=(),
    )


def _folded(low: LowRank, rank: int, factor: float = 1.0) -> LowRank:
    """Return the adapter times a factor, with a scale of 1 and zeros up to the rank."""
    extra, scale = rank - low.rank, factor * low.scale
    a = np.pad(low.a.astype(np.float32), ((0, 0), (0, extra)))
    b = np.pad(_times(low.b, scale), ((0, extra), (0, 0)))
    bias = None if low.bias is None else _times(low.bias, scale)
    return LowRank(a, b, scale=1.0, alpha=float(rank), bias=bias)


def _times(value: np.ndarray, scale: float) -> np.ndarray:
    return (value.astype(np.float64) * scale).astype(np.float32)


def concatenate(parts: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """Return one plain adapter that adds what several add, each times its factor; exact (PEFT's "cat").

    PEFT's other combinations are not offered: "linear" adds products of one adapter's matrix with another's, and the
    rest approximate.

    Raises:
      UserError: DoRA, or parts that no sum of adapters can express: whole modules, biases and rows of tokens that more
        than one adapter replaces, or that are weighed.
    """
    if not parts:
        raise UserError("no adapter is given to concatenate")
    for weights, factor in parts:
        if any(low.magnitude is not None for low in weights.low_rank.values()):
            raise UserError("DoRA adapters cannot be added: merge one after the other, or train on a merged base")
        if weights.parameters or weights.token_rows:
            whole = sorted({t.path for t in weights.parameters} | set(weights.token_rows))
            raise UserError(
                f"an adapter to add (factor {factor:g}) replaces whole parameters, which have no sum: "
                f"{', '.join(whole)}; merge that one into the base first"
            )
    targets = sorted({target for weights, _ in parts for target in weights.low_rank})
    sums = {t: _sum([(w.low_rank[t], factor) for w, factor in parts if t in w.low_rank]) for t in targets}
    first = parts[0][0]
    lora_bias = any(weights.config.lora_bias for weights, _ in parts)
    config = dataclasses.replace(
        first.config,
        use_rslora=False,
        lora_bias=lora_bias,
        targets=tuple(dict.fromkeys(t for weights, _ in parts for t in weights.config.targets)),
    )
    return plain(AdapterWeights(config, sums))


def _sum(parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    folded = [_folded(low, low.rank, factor) for low, factor in parts]
    a = np.concatenate([low.a for low in folded], 1)
    biases = [low.bias for low in folded if low.bias is not None]
    bias = np.sum(biases, 0, dtype=np.float32) if biases else None
    return LowRank(a, np.concatenate([low.b for low in folded], 0), 1.0, float(a.shape[1]), bias=bias)


def subtract_initial(weights: AdapterWeights, init: str, read_base: Callable[[Target], np.ndarray]) -> AdapterWeights:
    """Return a plain LoRA of twice the rank for the original base, of an adapter to a base that ``init`` changed.

    The difference to the original is ``scale * (a @ b - a0 @ b0)``: the ranks add, and alpha grows so that the scale
    stays (PEFT's path_initial_model_for_weight_conversion).

    Args:
      read_base: gives the original kernel of a target, [in, out].

    Raises:
      UserError: DoRA.
    """
    if any(low.magnitude is not None for low in weights.low_rank.values()):
        raise UserError(f"a DoRA adapter that began as {init!r} cannot be converted: merge it in PEFT")
    make = {"pissa": initial.pissa, "olora": initial.olora}[init]
    low_rank = {}
    for target, low in weights.low_rank.items():
        start = make(read_base(target).astype(np.float64), low.rank, low.scale)
        low_rank[target] = less_start(low, *(part.astype(np.float32) for part in start), weights.config)
    return dataclasses.replace(weights, config=doubled_config(weights.config), low_rank=low_rank)


def less_start(
    low: LowRank, start_a: Float[np.ndarray, "i r"], start_b: Float[np.ndarray, "r o"], config: AdapterConfig
) -> LowRank:
    """Return the adapter of twice the rank that adds what ``low`` adds less ``scale * start_a @ start_b``."""
    a = np.concatenate([low.a.astype(np.float32), start_a], 1)
    b = np.concatenate([low.b.astype(np.float32), -start_b], 0)
    return dataclasses.replace(low, a=a, b=b, alpha=low.alpha * _alpha_growth(config))


def doubled_config(config: AdapterConfig) -> AdapterConfig:
    """Return the configuration of what `less_start` gives: plain LoRA of twice the rank and the same scale."""
    growth = _alpha_growth(config)
    return dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=config.alpha * growth,
        init="default",
        rank_pattern=tuple((key, 2 * rank) for key, rank in config.rank_pattern),
        alpha_pattern=tuple((key, alpha * growth) for key, alpha in config.alpha_pattern),
    )


def _alpha_growth(config: AdapterConfig) -> float:
    """Return what keeps the scale as it is when the rank doubles."""
    return 2**0.5 if config.use_rslora else 2.0
