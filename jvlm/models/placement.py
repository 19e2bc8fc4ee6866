"""Where arrays live. Models name the axes of an array; whoever runs them decides which are split, and over what.

`Whole` is the answer of one device: nothing is split. `jvlm.parallel` has the other one. A model calls `current()`
while it is traced and never asks which of the two it got.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num
from jvlm_kernels import CrossEntropySum, cached_attention, linear_cross_entropy_sum, open_cache, segment_attention

# Axes that are split together with what they carry: tokens of a row, patches of a row, vision features of a row.
Along = Literal["sequence", "patches", "features"]


class Whole:
    """Everything on one device. Axes: B rows, S queries, T keys, H and K heads, D width, V vocabulary, F features."""

    def constrain(self, x: Num[Array, "..."], axes: tuple[str | None, ...]) -> Num[Array, "..."]:
        """An activation whose dimensions have these logical axes ("batch", "sequence", "patches", "embed", "mlp")."""
        return x

    def is_split(self, axis: str) -> bool:
        """Whether parameters' axis of this name is computed in parts on different devices."""
        return False

    def weight(self, value: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
        """A parameter about to be used by every row: gathered over the axes that only store it."""
        return value

    def local(
        self, function: Callable[..., Array], arrays: Sequence[Array], axes: Sequence[tuple[str | None, ...]]
    ) -> Array:
        """``function`` of the parts of arrays with these axes, each on its own device; the result has the first's axes.

        For what needs no other part, and what XLA does not split, or not rightly.
        """
        return function(*arrays)

    def attention(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        q_segments: Int[Array, "B S"],
        kv_segments: Int[Array, "B T"],
        *,
        along: Along,
        **options: Any,
    ) -> Float[Array, "B S H D"]:
        """`jvlm_kernels.segment_attention` with its ``options``.

        Where queries and keys are the same row, pass the same array of segments twice.
        """
        return segment_attention(q, k, v, q_segments, kv_segments, **options)

    def keep(self, x: Float[Array, "B T K D"], heads: int) -> Float[Array, "B T N D"]:
        """Keys or values that a cache will hold for so many query ``heads``; N is K, or more where devices want own."""
        return x

    def open_cache(
        self, k: Float[Array, "B S N D"], v: Float[Array, "B S N D"], places: int
    ) -> tuple[Float[Array, "B N D T"], Float[Array, "B N T D"]]:
        """`jvlm_kernels.open_cache` of what was kept."""
        return open_cache(k, v, places)

    def cached_attention(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        cache: tuple[Float[Array, "B N D T"], Float[Array, "B N T D"]],
        place: Int[Array, " B"],
        **options: Any,
    ) -> tuple[Float[Array, "B S H D"], tuple[Float[Array, "B N D T"], Float[Array, "B N T D"]]]:
        """`jvlm_kernels.cached_attention` with its ``options`` and a cache of `open_cache`'s."""
        return cached_attention(q, k, v, cache, place, **options)

    def lookup(
        self,
        table: Float[Array, "V D"],
        index: Int[Array, "B S"],
        dtype: DTypeLike,
        *,
        axes: tuple[str, str] = ("vocab", "embed"),
        along: Along = "sequence",
    ) -> Float[Array, "B S D"]:
        """Rows of a table of embeddings, as stored, cast to ``dtype``; ``axes`` are the table's."""
        return table[index].astype(dtype)

    def pick(self, features: Float[Array, "B F D"], index: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Feature ``index`` of the row for each token; what negative numbers give is not said."""
        return jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)

    def experts(
        self,
        function: Callable[..., tuple[Array, Array]],
        x: Float[Array, "B S D"],
        expert: Int[Array, "B S k"],
        gate: Float[Array, "B S k"],
        weights: tuple[Float[Array, "E _ _"], ...],
        axes: tuple[tuple[str, ...], ...],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S k"]]:
        """``function(x, expert, gate, *weights)`` where tokens and their experts' weights are in one place.

        Args:
          function: returns (what the experts add, 1 for choices that an expert took). Both are sums over experts, so
            that each device may do its own; choices that are none of its experts' have numbers outside 0..E.
          axes: of each of the weights, "experts" first; hidden units may be split as well.
        """
        return function(x, expert, gate, *weights)

    def cross_entropy_sum(
        self,
        hidden: Float[Array, "B S D"],
        kernel: Float[Array, "V D"] | Float[Array, "D V"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        **options: Any,
    ) -> CrossEntropySum:
        """`jvlm_kernels.linear_cross_entropy_sum` with its ``options``, over all tokens of all devices."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return linear_cross_entropy_sum(flat, kernel, targets.reshape(-1), weights.reshape(-1), **options)


_WHOLE = Whole()
_CURRENT: contextvars.ContextVar[Whole | None] = contextvars.ContextVar("placement", default=None)


def current() -> Whole:
    """The placement that the model being traced runs under."""
    return _CURRENT.get() or _WHOLE


@contextlib.contextmanager
def use(placement: Whole | None) -> Iterator[None]:
    """Trace models under a placement; None is `Whole`.

    A compiled function keeps the one it was traced under: enter this inside of it.
    """
    token = _CURRENT.set(placement)
    try:
        yield
    finally:
        _CURRENT.reset(token)
