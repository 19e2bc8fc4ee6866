"""Compare every kernel that the device runs natively with the reference in float32; status 1 if one is out of bounds.

An error is the norm of the difference over the norm of the reference. Each call runs twice: equal to the bit or not is
in the table. Inputs are random, segments of random lengths, the end of each packed sequence is padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels import (
    Unavailable,
    decode_attention,
    grouped_matmul,
    linear_cross_entropy,
    linear_cross_entropy_sum,
    segment_attention,
)

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, Python looks beside it only

from tools.timing import compile_all

# norm of the error over the norm of the result: three TensorFloat-32 products for one of float32, rounded operands else
BOUNDS = {"float32": 2e-4, "bfloat16": 1.2e-2, "float16": 2e-3}
# what a kernel that the installed JAX does not take may raise while it is lowered or compiled
REFUSED = (
    *(Unavailable, RuntimeError, ValueError, NotImplementedError),
    *(TypeError, AttributeError, AssertionError, LookupError),
)
ON_GPU = jax.default_backend() == "gpu"


class Check(NamedTuple):
    """A call and its reference, both from ``operands`` to a tree of arrays."""

    name: str
    dtype: str
    call: Callable
    reference: Callable
    operands: Sequence[Any]
    bound: float | None = None


def attention_checks(length: int) -> list[Check]:
    """Output, logsumexp and gradients of `segment_attention` by each implementation for this device."""
    names = ("pallas_gpu", "mosaic_gpu") if ON_GPU else ("xla",)
    shapes = {  # query heads, key heads, head size, settings
        "decoder": (8, 2, 128, {"causal": True}),
        "sliding window": (4, 4, 64, {"causal": True, "window": 200}),
        "ViT, images": (4, 4, 80, {}),
        "ViT, windows": (4, 4, 80, {"max_segment_length": 64}),
        "perceiver": (4, 1, 96, {}),
        "wide heads": (2, 2, 256, {"causal": True}),
    }
    checks = []
    for name in names:
        for title, (heads, kv_heads, size, settings) in shapes.items():
            short = settings.get("max_segment_length")
            for dtype in ("bfloat16", "float16", "float32"):
                if name == "mosaic_gpu" and dtype == "float32":
                    continue  # it takes halves alone
                keys = jax.random.split(jax.random.key(len(checks)), 4)
                shapes_ = [(2, length, h, size) for h in (heads, kv_heads, kv_heads, heads)]
                q, k, v, weight = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes_, strict=True))
                ids = jnp.asarray(packed_ids(2, length, short or length // 2))
                checks.append(
                    Check(
                        f"segment_attention {name}, {title}",
                        dtype,
                        attend_and_differentiate(name, settings),
                        attend_and_differentiate("reference", settings),
                        (q, k, v, weight, ids),
                    )
                )
    return checks


def attend_and_differentiate(name: str, settings: dict[str, Any]) -> Callable:
    """Return ``(q, k, v, weight, ids) -> (out, logsumexp, dq, dk, dv)`` of a loss that uses both outputs."""

    def call(q, k, v, weight, ids):
        def total(q, k, v):
            out, logsumexp = segment_attention(
                q, k, v, ids, ids, implementation=name, return_logsumexp=True, **settings
            )
            logsumexp = jnp.where(ids[..., None] > 0, logsumexp, 0.0)
            return (out * weight).astype(jnp.float32).sum() + jnp.sin(logsumexp).sum(), (out, logsumexp)

        gradients, outputs = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return *outputs, *gradients

    return call


def packed_ids(rows: int, length: int, longest: int) -> np.ndarray:
    """Segment ids [rows, length], segments of 1 to ``longest`` tokens, the last sixteenth padding."""
    rng = np.random.default_rng(length)
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        lengths = rng.integers(1, longest + 1, length)
        row[:] = np.repeat(np.arange(1, length + 1), lengths)[:length]
        row[length - length // 16 :] = 0
    return ids


def decode_checks(cache_len: int) -> list[Check]:
    """One new token of each sequence against a cache, contiguous and in pages."""
    B, H, K, D = 4, 8, 2, 128
    checks = []
    for dtype in ("bfloat16", "float32"):
        for paged in (False, True):
            rows, size = (B * cache_len // 128, 128) if paged else (B, cache_len)
            keys = jax.random.split(jax.random.key(paged), 3)
            q = jax.random.normal(keys[0], (B, 1, H, D), dtype)
            cache = (
                jax.random.normal(keys[1], (rows, K, D, size), dtype),
                jax.random.normal(keys[2], (rows, K, size, D), dtype),
            )
            lengths = jnp.asarray([1, cache_len // 3, cache_len - 5, cache_len])
            tables = np.random.default_rng(0).permutation(rows).reshape(B, -1).astype(np.int32) if paged else None

            title = "pages" if paged else "contiguous"
            checks.append(
                Check(
                    f"decode_attention {title}",
                    dtype,
                    decode_with(None, tables),
                    decode_with("xla", tables),
                    (q, *cache, lengths),
                )
            )
    return checks


def decode_with(implementation: str | None, tables: np.ndarray | None) -> Callable:
    """Return ``(q, keys, values, lengths) -> out``."""

    def call(q, keys, values, lengths):
        return decode_attention(q, (keys, values), lengths, block_tables=tables, implementation=implementation)

    return call


def grouped_checks(rows: int) -> list[Check]:
    """Return the product of sorted rows with a matrix for each group, and its gradients."""
    sizes = np.array([rows // 2, 0, rows // 8, rows - rows // 2 - rows // 8], np.int32)

    def call(x, matrices, weight):
        def total(x, matrices):
            y = grouped_matmul(x, matrices, jnp.asarray(sizes))
            return (y * weight).astype(jnp.float32).sum(), y

        gradients, y = jax.grad(total, (0, 1), has_aux=True)(x, matrices)
        return y, *gradients

    def reference(x, matrices, weight):
        def total(x, matrices):
            y = jnp.einsum("nd,ndf->nf", x, jnp.repeat(matrices, sizes, axis=0, total_repeat_length=rows))
            return (y * weight).sum(), y

        gradients, y = jax.grad(total, (0, 1), has_aux=True)(x, matrices)
        return y, *gradients

    checks = []
    for dtype in ("bfloat16", "float32"):
        keys = jax.random.split(jax.random.key(7), 3)
        shapes = (rows, 128), (4, 128, 256), (rows, 256)
        operands = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
        checks.append(Check("grouped_matmul", dtype, call, reference, operands))
    return checks


def loss_checks(tokens: int) -> list[Check]:
    """Both cross-entropies with their gradients, a third of the tokens supervised."""
    targets = np.random.default_rng(3).integers(0, 5000, tokens)
    targets[np.arange(tokens) % 3 > 0] = -100
    targets = jnp.asarray(targets)

    def plain(hidden, kernel):
        logits = hidden @ kernel
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
        return jnp.where(targets < 0, 0.0, jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    losses = {
        "linear_cross_entropy_sum": lambda hidden, kernel: linear_cross_entropy_sum(hidden, kernel, targets).loss,
        "linear_cross_entropy": lambda hidden, kernel: linear_cross_entropy(hidden, kernel, targets).loss.sum(),
    }
    checks = []
    for dtype in ("bfloat16", "float32"):
        keys = jax.random.split(jax.random.key(9), 2)
        hidden = jax.random.normal(keys[0], (tokens, 256), dtype)
        kernel = jax.random.normal(keys[1], (256, 5000), dtype) / 16
        reference = jax.value_and_grad(plain, (0, 1))
        checks += [
            # XLA's own products, which on GPUs are of TensorFloat-32 unless one asks for more
            Check(name, dtype, jax.value_and_grad(f, (0, 1)), reference, (hidden, kernel), max(1e-3, BOUNDS[dtype]))
            for name, f in losses.items()
        ]
    return checks


def in_full_precision(function: Callable) -> Callable:
    """Return the same with products of float32 as such, which GPUs do not give by themselves."""

    def call(*operands):
        with jax.default_matmul_precision("highest"):
            return function(*operands)

    return call


def upcast(tree: Any) -> Any:
    """Return the same values, floats as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def errors_of(found: Any, expected: Any) -> list[float]:
    """Norm of each array's error over the norm of what is expected."""
    errors = []
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):  # the logsumexp of padding is -inf in both
            errors.append(float("nan"))
            continue
        x, y = (np.where(np.isfinite(z), z, 0.0) for z in (x, y))
        errors.append(float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)))
    return errors


def main() -> int:
    size = 1024 if ON_GPU else 256
    checks = [*attention_checks(size), *decode_checks(size), *grouped_checks(size), *loss_checks(size)]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n", flush=True)
    references = compile_all([(in_full_precision(c.reference), upcast(c.operands)) for c in checks], ())
    programs = compile_all([(c.call, c.operands) for c in checks], REFUSED)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print(
        "| kernel | dtype | largest relative error | bound | runs equal to the bit |\n| --- | --- | ---: | ---: | --- |"
    )
    failed = 0
    for check, program, reference in zip(checks, programs, references, strict=True):
        if isinstance(program, Exception):
            failed += 1
            print(
                f"| {check.name} | {check.dtype} | does not run: {str(program).splitlines()[0][:160]} | | |", flush=True
            )
            continue
        first, second = (jax.tree.map(np.asarray, program(*check.operands)) for _ in range(2))
        errors = errors_of(first, reference(*upcast(check.operands)))
        equal = all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
        bound, worst = check.bound or BOUNDS[check.dtype], max(errors, key=lambda e: (np.isnan(e), e))
        good = worst <= bound  # NaN is not
        failed += not good
        line = f"| {check.name} | {check.dtype} | {worst:.1e} | {bound:.0e} | {'yes' if equal else 'no'} |"
        print(line + ("" if good else f" OUT OF BOUND: {', '.join(f'{e:.1e}' for e in errors)}"), flush=True)
    print(f"\n{len(checks) - failed} of {len(checks)} within bounds")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
