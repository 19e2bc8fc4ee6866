"""How the next token is chosen: greedy, or drawn after the filters that transformers calls logits warpers.

Axes: B sequences, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jvlm.errors import UserError

# In place of a token, of a sequence whose scores are not all finite numbers: the best of these would be no answer.
NOT_FINITE = -1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Names and meanings as in transformers' ``GenerationConfig``.

    Attributes:
      max_new_tokens: generation stops after so many tokens.
      temperature: divides the logits; 0 takes the likeliest token and makes top_k, top_p and seed idle.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens whose probabilities reach p together; 1 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
      seed: with the number of the conversation, decides every draw; the batch it is in does not matter.
      stop_token_ids: a sequence ends with any of these; None takes the model's own end tokens.

    Raises:
      UserError: a value outside its range or of another type, naming the field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        self._check("max_new_tokens", lambda n: n >= 1 and n == int(n), "a whole number, at least 1")
        self._check("temperature", lambda t: t >= 0, "0 (greedy) or a positive number")
        self._check("top_k", lambda k: k >= 0 and k == int(k), "0 (off) or a number of tokens")
        self._check("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1 (off)")
        self._check("repetition_penalty", lambda r: r > 0, "positive; 1 is off")
        self._check("seed", lambda s: 0 <= s < 2**32 and s == int(s), "a whole number from 0 to 2**32 - 1")
        for field in ("max_new_tokens", "top_k", "seed"):
            object.__setattr__(self, field, int(getattr(self, field)))
        ids = self.stop_token_ids
        if ids is None:
            return
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise UserError(f"sampling.stop_token_ids is {ids!r}; it must be a list of token ids")
        ids = tuple(ids)
        if any(isinstance(i, bool) or not isinstance(i, numbers.Integral) for i in ids):
            raise UserError(f"sampling.stop_token_ids is {ids!r}; it must be a list of whole numbers")
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in ids))

    def _check(self, field: str, holds: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, field)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not holds(value):
            raise UserError(f"sampling.{field} is {value!r}; it must be {wanted}")

    @property
    def flags(self) -> SamplingFlags:
        sampled = self.temperature > 0
        filtered = sampled and (self.top_k > 0 or self.top_p < 1)
        return SamplingFlags(sampled, filtered, self.repetition_penalty != 1)


class SamplingFlags(NamedTuple):
    """Static flags of a compiled step: draw instead of taking the best, filter before drawing, penalise repetition."""

    sampled: bool
    filtered: bool
    penalised: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The values of a `SamplingConfig` as arrays, so that changing one compiles nothing.

    ``request_ids`` [B] is the id of each sequence's request, which makes its draws independent of the batch.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    seed: UInt[Array, ""]
    request_ids: Int[Array, " B"]

    @classmethod
    def of(cls, config: SamplingConfig, request_ids: np.ndarray) -> SamplingArrays:
        return cls(
            temperature=jnp.float32(config.temperature),
            top_k=jnp.int32(config.top_k),
            top_p=jnp.float32(config.top_p),
            repetition_penalty=jnp.float32(config.repetition_penalty),
            seed=jnp.uint32(config.seed),
            request_ids=jnp.asarray(request_ids, jnp.int32),
        )


def sample(
    logits: Float[Array, "B V"],
    flags: SamplingFlags,
    arrays: SamplingArrays,
    step: Int[Array, ""],
    *,
    banned: Bool[Array | np.ndarray, " V"],
    seen_tokens: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """The next token of each sequence: the best of `adjust`'s logits, or one drawn by their softmax.

    It is `NOT_FINITE` where a logit is NaN or infinite.

    Args:
      step: number of the token within its answer; with seed and sequence number it is the random key.
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    logits = adjust(logits, flags, arrays, banned=banned, seen_tokens=seen_tokens)
    if flags.sampled:

        def noise(number):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(arrays.seed), number), step)
            return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

        logits += jax.vmap(noise)(arrays.request_ids)
    return jnp.where(finite, jnp.argmax(logits, axis=-1), NOT_FINITE).astype(jnp.int32)


def adjust(
    logits: Float[Array, "B V"],
    flags: SamplingFlags,
    arrays: SamplingArrays,
    *,
    banned: Bool[Array | np.ndarray, " V"],
    seen_tokens: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Logits after all filters, in transformers' order: repetition penalty, temperature, top-k, top-p.

    Args:
      banned: tokens that are never chosen.
      seen_tokens: tokens of prompt and answer so far; needed when ``flags.penalised``.
    """
    logits = jnp.where(banned, -jnp.inf, logits)
    if flags.penalised:
        logits = penalise_repetition(logits, seen_tokens, arrays.repetition_penalty)
    if flags.sampled:
        logits = logits / arrays.temperature
    if flags.filtered:
        logits = keep_top_p(keep_top_k(logits, arrays.top_k), arrays.top_p)
    return logits


def penalise_repetition(
    logits: Float[Array, "B V"], seen_tokens: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Positive logits of seen tokens divided by the penalty, negative ones multiplied (CTRL, arXiv 1909.05858)."""
    return jnp.where(seen_tokens, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, ""]) -> Float[Array, "B V"]:
    """-inf below the k-th largest logit of each sequence; ties with it stay. k = 0 keeps all."""
    k = jnp.where(k <= 0, logits.shape[-1], jnp.minimum(k, logits.shape[-1]))
    keys = _ordered(logits)
    least = _largest_key(keys, lambda above: jnp.sum(above, axis=-1) >= k)
    return jnp.where(keys >= least[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf for tokens outside the smallest set of likeliest ones whose probabilities reach p; ties stay."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    keys = _ordered(logits)
    least = _largest_key(keys, lambda above: jnp.sum(jnp.where(above, probabilities, 0.0), axis=-1) >= p)
    return jnp.where((keys >= least[:, None]) | (p >= 1), logits, -jnp.inf)


def _ordered(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """uint32 keys in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _largest_key(keys: UInt[Array, "B V"], enough: Callable[[Array], Array]) -> UInt[Array, " B"]:
    """The largest key t of each sequence for which the tokens with keys >= t are enough.

    One bit at a time from the top: 32 passes over the sequence, which is less than a sort and exact.
    """

    def settle(i, least):
        candidate = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, least)

    return jax.lax.fori_loop(0, 32, settle, jnp.zeros(keys.shape[0], jnp.uint32))
