"""How the next token is chosen: greedy, or drawn after the filters that transformers calls logits warpers.

Every sequence of a batch has numbers of its own, and what a sequence gets does not depend on the others.

Axes: B sequences, V vocabulary, S slots.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt

from jvlm.errors import UserError
from jvlm.inference.requests import SamplingParams

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

    def params(self, number: int = 0, **fields: Any) -> SamplingParams:
        """Return the parameters of the request with a number. ``fields`` are others of `SamplingParams`."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_tokens=self.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            number=number,
            **fields,
        )


def has_rules(params: SamplingParams) -> bool:
    """Return whether a request asks anything of single tokens."""
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or params.min_tokens > 0
    )


_INTS = ("slot", "number", "seed", "step", "top_k", "min_tokens", "ruled", "masked", "scored")
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
SLOT, STEP, SCORED = (_INTS.index(name) for name in ("slot", "step", "scored"))
COLUMNS = len(_INTS) + len(_FLOATS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The numbers of each sequence's sampling. Changing one compiles nothing.

    Attributes:
      ints: columns slot, number (of the answer, which makes its draws its own), seed, step (number of the token within
        the answer), top_k, min_tokens, ruled (whether the slot's `SlotRules` hold), masked (whether the host says which
        tokens may come), scored (0: no log-probabilities; otherwise one more than the likeliest tokens to report).
      floats: columns temperature, top_p, min_p, and the repetition, presence and frequency penalties.
    """

    ints: Int32[Array | np.ndarray, "B 9"]
    floats: Float[Array | np.ndarray, "B 6"]

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], slots: Sequence[int], numbers: Sequence[int], steps: Sequence[int]
    ) -> SamplingArrays:
        """Return the arrays of requests, on the host."""
        ints = [
            (
                slot,
                number,
                np.uint32(p.seed).view(np.int32),
                step,
                p.top_k,
                p.min_tokens,
                has_rules(p),
                p.is_constrained,
                0 if p.logprobs is None else 1 + p.logprobs,
            )
            for p, slot, number, step in zip(params, slots, numbers, steps, strict=True)
        ]
        floats = [
            (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in params
        ]
        return cls(
            np.array(ints, np.int32).reshape(-1, len(_INTS)), np.array(floats, np.float32).reshape(-1, len(_FLOATS))
        )

    def packed(self) -> Int32[np.ndarray, "B 15"]:
        """Return all numbers in one array of the host, which is one transfer."""
        return np.concatenate([self.ints, np.asarray(self.floats).view(np.int32)], axis=1)

    @classmethod
    def unpacked(cls, rows: Int[Array, "B 15"]) -> SamplingArrays:
        """Return the arrays that `packed` made one of, on the device."""
        return cls(rows[:, : len(_INTS)], jax.lax.bitcast_convert_type(rows[:, len(_INTS) :], jnp.float32))

    def at_step(self, step: Int[Array, " B"]) -> SamplingArrays:
        """Return the same for other tokens of the answers."""
        return dataclasses.replace(self, ints=self.ints.at[:, STEP].set(step))

    def __getattr__(self, name: str) -> Any:
        if name in _INTS:
            return self.ints[:, _INTS.index(name)]
        if name in _FLOATS:
            return self.floats[:, _FLOATS.index(name)]
        raise AttributeError(name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotRules:
    """What requests ask of single tokens, by slot; the last row is that of requests that ask nothing.

    Attributes:
      bias: added to the logits; -inf forbids a token.
      seen: tokens of the prompt.
      ends: tokens that end the answer.
      counts: how often the answer holds each token.
    """

    bias: Float[Array, "*S V"]
    seen: Bool[Array, "*S V"]
    ends: Bool[Array, "*S V"]
    counts: Int[Array, "*S V"]

    @classmethod
    def empty(cls, slots: int, vocabulary: int) -> SlotRules:
        """Return rules for slots that ask nothing."""
        shape = slots + 1, vocabulary
        flags = (jnp.zeros(shape, bool) for _ in range(2))
        return cls(jnp.zeros(shape, jnp.float32), *flags, jnp.zeros(shape, jnp.int32))

    def at_slot(
        self, slot: Int[Array, ""], bias: Float[Array, " V"], seen: Bool[Array, " V"], ends: Bool[Array, " V"], counts
    ) -> SlotRules:
        """Return the rules with those of a slot replaced."""
        new = SlotRules(bias, seen, ends, counts)
        return jax.tree.map(lambda old, row: old.at[slot].set(row.astype(old.dtype)), self, new)


def sample(
    logits: Float[Array, "B V"],
    arrays: SamplingArrays,
    *,
    banned: Bool[Array | np.ndarray, "2 V"],
    rules: SlotRules | None = None,
    mask: Int[Array | np.ndarray, "B _"] | None = None,
) -> Int[Array, " B"]:
    """The next token of each sequence: the best of `adjust`'s logits, or one drawn by their softmax.

    It is `NOT_FINITE` where a logit is NaN or infinite. The device does no more than the most demanding sequence asks:
    the best token alone, a draw, or everything. Arguments as of `adjust`.
    """
    banned, arrays = jnp.asarray(banned), jax.tree.map(jnp.asarray, arrays)

    def greedy(logits):
        return jnp.argmax(_without(logits, banned, arrays), axis=-1)

    def draw(logits):
        seed = jax.lax.bitcast_convert_type(arrays.seed, jnp.uint32)
        drawn = logits + gumbel_noise(seed, arrays.number, arrays.step, logits.shape[-1])
        return jnp.argmax(jnp.where((arrays.temperature > 0)[:, None], drawn, logits), axis=-1)

    kinds = (
        greedy,
        lambda logits: draw(_tempered(_without(logits, banned, arrays), arrays)),
        lambda logits: draw(adjust(logits, arrays, banned=banned, rules=rules, mask=mask)),
    )
    all_of_it = jnp.any(_filtered(arrays) | (arrays.ruled > 0) | (arrays.masked > 0))
    kind = jnp.where(all_of_it, 2, jnp.any(arrays.temperature > 0))
    chosen = jax.lax.switch(kind, kinds, logits)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), chosen, NOT_FINITE).astype(jnp.int32)


def gumbel_noise(
    seeds: UInt[Array, " B"], numbers: Int[Array, " B"], steps: Int[Array, " B"], vocabulary: int
) -> Float[Array, "B V"]:
    """Return what is added to the logits of a token, whose largest sum is then drawn by their softmax.

    Args:
      seeds, numbers, steps: of `SamplingArrays`; they alone decide the numbers.
    """

    def one(seed, number, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
        return jax.random.gumbel(key, (vocabulary,), jnp.float32)

    return jax.vmap(one)(seeds, numbers, steps)


def adjust(
    logits: Float[Array, "B V"],
    arrays: SamplingArrays,
    *,
    banned: Bool[Array | np.ndarray, "2 V"],
    rules: SlotRules | None = None,
    mask: Int[Array | np.ndarray, "B _"] | None = None,
) -> Float[Array, "B V"]:
    """Logits after all filters, in transformers' order: penalties and bias, temperature, top-k, top-p, min-p.

    Args:
      banned: tokens that are never chosen, and those that are not chosen first.
      rules: needed where a sequence is ruled.
      mask: a bit for each token that may be chosen, 32 in a number; needed where a sequence is masked.
    """
    banned, arrays = jnp.asarray(banned), jax.tree.map(jnp.asarray, arrays)
    logits = _without(logits, banned, arrays)
    if rules is not None:
        logits = _ruled(logits, arrays, rules)
    if mask is not None:
        bits = jnp.asarray(mask)[..., None] >> jnp.arange(32, dtype=jnp.int32) & 1
        allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] > 0
        logits = jnp.where(allowed | (arrays.masked <= 0)[:, None], logits, -jnp.inf)

    def filtered(logits):
        # a greedy sequence keeps all of its logits: its best token is kept by every filter
        return keep_min_p(keep_top_p(keep_top_k(logits, arrays.top_k), arrays.top_p), arrays.min_p)

    logits = _tempered(logits, arrays)
    return jax.lax.cond(jnp.any(_filtered(arrays)), filtered, lambda logits: logits, logits)


def _without(logits, banned, arrays: SamplingArrays):
    return jnp.where(banned[(arrays.step == 0).astype(jnp.int32)], -jnp.inf, logits)


def _tempered(logits, arrays: SamplingArrays):
    return logits / jnp.where(arrays.temperature > 0, arrays.temperature, 1.0)[:, None]


def _filtered(arrays: SamplingArrays):
    """Return which sequences draw from a part of the tokens."""
    return (arrays.temperature > 0) & ((arrays.top_k > 0) | (arrays.top_p < 1) | (arrays.min_p > 0))


def _ruled(logits, arrays: SamplingArrays, rules: SlotRules):
    ruled = arrays.ruled > 0
    slot = jnp.where(ruled, arrays.slot, len(rules.bias) - 1)
    own = jax.tree.map(lambda part: part[slot], rules)
    held = own.counts > 0
    logits = penalise_repetition(logits, own.seen | held, arrays.repetition[:, None])
    presence, frequency = arrays.presence[:, None], arrays.frequency[:, None]
    logits = logits - jnp.where(held, presence, 0.0) - frequency * own.counts + own.bias
    early = (arrays.step < arrays.min_tokens)[:, None]
    return jnp.where(own.ends & early, -jnp.inf, logits)


def counted(
    rules: SlotRules, arrays: SamplingArrays, tokens: Int[Array, " B"], wanted: Bool[Array, " B"] | bool = True
) -> SlotRules:
    """Return the rules with one more of each sequence's token, where it is wanted."""
    ruled = (arrays.ruled > 0) & (tokens >= 0) & wanted
    slot = jnp.where(ruled, arrays.slot, len(rules.bias) - 1)
    counts = rules.counts.at[slot, jnp.maximum(tokens, 0)].add(ruled.astype(rules.counts.dtype))
    return dataclasses.replace(rules, counts=counts)


def penalise_repetition(
    logits: Float[Array, "B V"], seen_tokens: Bool[Array, "B V"], penalty: Float[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Positive logits of seen tokens divided by the penalty, negative ones multiplied (CTRL, arXiv 1909.05858)."""
    return jnp.where(seen_tokens, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, "B V"]:
    """-inf below the k-th largest logit of each sequence; ties with it stay. k = 0 keeps all."""
    k = jnp.where(k <= 0, logits.shape[-1], jnp.minimum(k, logits.shape[-1]))
    keys = _ordered(logits)
    least = _largest_key(keys, lambda above: jnp.sum(above, axis=-1) >= k)
    return jnp.where(keys >= least[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf for tokens outside the smallest set of likeliest ones whose probabilities reach p; ties stay."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    keys = _ordered(logits)
    least = _largest_key(keys, lambda above: jnp.sum(jnp.where(above, probabilities, 0.0), axis=-1) >= p)
    return jnp.where((keys >= least[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf for tokens less than p times as likely as the likeliest; p = 0 keeps all."""
    least = logits.max(axis=-1, keepdims=True) + jnp.log(p)[:, None]
    return jnp.where(logits >= least, logits, -jnp.inf)


class Logprobs(NamedTuple):
    """Of tokens under a log-softmax.

    Attributes:
      chosen: log-probability of the given tokens.
      entropy: in nats.
      top, top_tokens: the largest log-probabilities, best first, and their tokens.
    """

    chosen: Float[Array, " B"]
    entropy: Float[Array, " B"]
    top: Float[Array, "B n"]
    top_tokens: Int[Array, "B n"]


def logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"], count: int) -> Logprobs:
    """Return the log-probabilities of tokens, and of the ``count`` likeliest."""
    values = jax.nn.log_softmax(logits, axis=-1)
    top, top_tokens = jax.lax.top_k(values, min(count, values.shape[-1]))
    return Logprobs(*_scores(values, tokens), top, top_tokens)


def asked_logprobs(
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    count: int,
    scored: Int[Array, " B"],
    scores: Callable[[Array], Array] = lambda logits: logits,
) -> Logprobs:
    """Return `logprobs` as far as sequences ask for them by `SamplingArrays.scored`; zeros for what nobody asks.

    Args:
      scores: returns the logits whose distribution is meant, from those of the model.
    """
    n = min(count, logits.shape[-1])
    empty = Logprobs(*jnp.zeros((2, len(logits))), jnp.zeros((len(logits), n)), jnp.zeros((len(logits), n), jnp.int32))

    def of_tokens(logits):
        return Logprobs(*_scores(jax.nn.log_softmax(scores(logits), axis=-1), tokens), *empty[2:])

    kinds = (lambda logits: empty, of_tokens, lambda logits: logprobs(scores(logits), tokens, n))
    return jax.lax.switch(jnp.clip(scored.max(), 0, 2), kinds, logits)


def _scores(values, tokens):
    """Return the log-probabilities of tokens, and the entropies."""
    chosen = jnp.take_along_axis(values, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    # a token that cannot be drawn has no share in the entropy
    return chosen, -jnp.sum(jnp.where(values == -jnp.inf, 0.0, jnp.exp(values) * values), axis=-1)


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
