"""What torch offers for the cases of bench_kernels.py, timed on the device that torch finds."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tools.bench_kernels import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sdpa(case: Case) -> Callable:
    """torch `scaled_dot_product_attention` (a mask in memory where rows are packed)."""
    ids = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths)).to(DEVICE)
    same = ids[:, None] == ids[None]
    mask = (same.tril() if case.causal else same)[None, None] if case.segment else None

    def attend(q, k, v):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=True
        )

    return attend


def varlen(case: Case) -> Callable:
    """torch `varlen_attn` (FlashAttention)."""
    if DEVICE == "cpu":
        raise NotImplementedError("torch has it on GPUs alone")
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    settings = {}
    if case.causal:
        settings = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known
    if grouped:
        settings["enable_gqa"] = True
    ends = torch.tensor([0, *case.lengths]).cumsum(0).to(DEVICE, torch.int32)
    groups, longest = case.heads[0] // case.heads[1], max(case.lengths)

    def attend(q, k, v):
        q, k, v = (x[0] for x in (q, k, v))
        if not grouped:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, ends, ends, longest, longest, **settings)

    return attend


ATTENTION = (sdpa, varlen)


def plain_logits(hidden, kernel, targets):
    """torch `cross_entropy` of all logits at once."""
    return torch.nn.functional.cross_entropy((hidden @ kernel).float(), targets, reduction="sum")


def liger(hidden, kernel, targets):
    """Liger's fused linear cross-entropy."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as fused
    except ImportError as error:
        raise NotImplementedError(f"not installed ({error})") from error
    found = fused.apply(hidden, kernel.T, targets, None, None, -100, 0.0, 0.0, "sum")
    return found[0] if isinstance(found, tuple) else found


LOSSES = (plain_logits, liger)


def measure_attention(make: Callable, case: Case, rounds: int, calls: int = 1) -> tuple[float, int | None]:
    """(median seconds, temporary bytes)."""
    attend = make(case)
    H, K, D = case.heads
    operands = [_random((1, case.S, heads, D), case.dtype, case.backward) for heads in (H, K, K)]

    def run():
        with torch.set_grad_enabled(case.backward):
            out = attend(*operands)
            return torch.autograd.grad(out.float().sum(), operands) if case.backward else out

    return _measure(run, rounds, calls)


def measure_loss(
    function: Callable, targets: np.ndarray, hidden: int, vocabulary: int, dtype: str, rounds: int, calls: int = 1
) -> tuple[float, int | None]:
    """As `measure_attention`, of value and both gradients."""
    operands = [_random(shape, dtype, True) for shape in ((len(targets), hidden), (hidden, vocabulary))]
    words = torch.from_numpy(targets).to(DEVICE)
    return _measure(lambda: torch.autograd.grad(function(*operands, words), operands), rounds, calls)


def _random(shape: tuple[int, ...], dtype: str, requires_grad: bool) -> torch.Tensor:
    scale = shape[0] ** -0.5 if len(shape) == 2 else 1.0
    values = torch.randn(shape, device=DEVICE, dtype=getattr(torch, dtype)) * scale
    return values.requires_grad_(requires_grad)


def _measure(run: Callable, rounds: int, calls: int) -> tuple[float, int | None]:
    run()
    _wait()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            result = run()
            del result
        _wait()
        taken.append((time.perf_counter() - began) / calls)
    temporary = torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else None
    return statistics.median(taken), temporary


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
