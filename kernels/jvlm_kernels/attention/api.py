"""The one attention call and the choice of its implementation.

Shapes: B rows, S queries, T keys, H query heads, K key/value heads (H a multiple of K), D head size.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int


class Unavailable(Exception):
    """Why an implementation cannot run one particular call."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of a call: what an implementation may decide on before it sees values.

    Attributes:
      causal: key index must not exceed query index; needs S == T.
      window: a query sees keys fewer than ``window`` places away (behind it, when causal); None is no limit.
      scale: multiplies the query-key products.
      max_segment_length: promise that no segment is longer and that equal ids are contiguous. It needs
        ``q_segments`` and ``kv_segments`` to be the same ids; implementations use it to skip keys out of reach.
    """

    causal: bool
    window: int | None
    scale: float
    max_segment_length: int | None


Implementation = Callable[..., tuple[Array, Array]]

# Best first. A module offers ``check(spec, q, k, v) -> None`` (raises Unavailable) and
# ``attention(spec, q, k, v, q_segments, kv_segments) -> (out, logsumexp)``.
_MODULES = {
    "xla": "jvlm_kernels.attention.xla",
    "reference": "jvlm_kernels.attention.reference",
}


def implementations() -> tuple[str, ...]:
    """Names accepted by ``implementation=``, in order of preference."""
    return tuple(_MODULES)


def segment_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    max_segment_length: int | None = None,
    implementation: str | None = None,
    return_logsumexp: bool = False,
) -> Float[Array, "B S H D"] | tuple[Float[Array, "B S H D"], Float[Array, "B S H"]]:
    """Softmax attention in which a query sees the keys of its own segment only.

    Segment 0 is padding: it sees nothing and is seen by nothing. A query that sees no key gives zeros, a
    logsumexp of -inf and zero gradients. Scores and softmax are float32 whatever the inputs.

    Args:
      scale: defaults to D ** -0.5.
      max_segment_length: see `AttentionSpec`; a hint for speed that never changes the result while it is true.
      implementation: a name of `implementations()`; None takes the first that supports the call.
      return_logsumexp: also return the float32 logsumexp of the scaled scores.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      Unavailable: the implementation asked for (or every one) cannot run this call; says why for each.
    """
    _check_shapes(q, k, v, q_segments, kv_segments, causal, window)
    if max_segment_length is not None and max_segment_length < 1:
        raise ValueError(f"max_segment_length must be positive, got {max_segment_length}")
    if max_segment_length is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"max_segment_length needs equal lengths, got S={q.shape[1]} and T={k.shape[1]}")
    spec = AttentionSpec(causal, window, q.shape[-1] ** -0.5 if scale is None else scale, max_segment_length)
    names = implementations() if implementation is None else (implementation,)
    reasons = []
    for name in names:
        if name not in _MODULES:
            raise ValueError(f"unknown implementation {name!r}; known: {', '.join(_MODULES)}")
        module = importlib.import_module(_MODULES[name])
        try:
            module.check(spec, q, k, v)
        except Unavailable as reason:
            reasons.append(f"{name}: {reason}")
            continue
        with jax.named_scope(f"segment_attention_{name}"):
            out, logsumexp = module.attention(spec, q, k, v, q_segments, kv_segments)
        return (out, logsumexp) if return_logsumexp else out
    raise Unavailable("no attention implementation can run this call: " + "; ".join(reasons))


def _check_shapes(q, k, v, q_segments, kv_segments, causal, window) -> None:
    B, S, H, D = q.shape
    T, K = k.shape[1:3]
    if k.shape != (B, T, K, D) or v.shape != k.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key/value heads")
    if q_segments.shape != (B, S) or kv_segments.shape != (B, T):
        raise ValueError(f"segment ids {q_segments.shape}, {kv_segments.shape} do not fit q {q.shape}, k {k.shape}")
    if causal and S != T:
        raise ValueError(f"causal attention needs equal lengths, got S={S} and T={T}")
    if window is not None and window < 1:
        raise ValueError(f"window must be positive, got {window}")
