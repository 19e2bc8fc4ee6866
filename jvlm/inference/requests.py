"""What the engine is asked and what it answers: requests, how they are sampled, and the events of each token.

Imports no jax: a server's front end, evaluation and rollouts build and read these without a device.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jvlm.data.packing import Example
from jvlm.errors import UserError

FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark", "boxes"]

MAX_LISTED_IDS = 1024  # of logit_bias and of allowed_token_ids: a server must not be made to move more for a request
MAX_TOP_LOGPROBS = 20
CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must be. `jvlm.inference.constrain` compiles it.

    Attributes:
      kind: "json_object" (any object), "json_schema", "regex", "choice" (one of some strings), "lark" (a grammar of
        llguidance), "boxes" (a list of labelled boxes within the picture).
      value: the schema as JSON text, the expression, the grammar; None for "json_object" and "boxes".
      choices: of "choice".
      after: text that must have been generated before the grammar begins, "</think>" say; None begins at once.
      image_size: (width, height) that coordinates of "boxes" stay within, in the pixels that the model writes; None is
        the prompt's pictures.
    """

    kind: GrammarKind
    value: str | None = None
    choices: tuple[str, ...] = ()
    after: str | None = None
    image_size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the answer to one request is chosen. Names and meanings as in vLLM and transformers.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token and makes top_k, top_p, min_p and seed idle.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens whose probabilities reach p together; 1 keeps all.
      min_p: keep tokens at least this share as likely as the likeliest; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
      presence_penalty: subtracted from the logits of tokens that the answer holds.
      frequency_penalty: subtracted from their logits for each time that the answer holds them.
      logit_bias: token id -> number added to its logit.
      allowed_token_ids: the only tokens that may be given, end tokens included; None allows all.
      seed: with the number of the answer, decides every draw; what runs beside the request does not matter.
      max_tokens: the answer ends after so many tokens.
      min_tokens: no end token is given before so many tokens.
      stop: texts that end the answer where they appear in it.
      include_stop: leave the text that ended the answer in it.
      stop_token_ids: an answer ends with any of these; None takes the checkpoint's own end tokens.
      ignore_eos: give end tokens like any other, and go on until ``max_tokens``.
      n: number of answers, which share one prefill. Answer i draws as request number ``number + i`` would.
      number: of the conversation, for its draws: two requests with one seed and two numbers draw differently.
      logprobs: give the log-probability of each token and of so many of the likeliest; 0 is the token alone.
      prompt_logprobs: the same for the tokens of the prompt.
      grammar: what the answer must be.
      thinking_budget: tokens after which thinking is ended by ``</think>``; None lets it go on.
      bad_words: texts whose tokens do not follow one another in the answer, at its beginning or after a space.
      skip_special_tokens: leave special tokens out of the text.
      detokenize: give the text of an answer besides its tokens.
      stream: give text as soon as it is known; without it, the last event of an answer has all of it, which costs less.

    Raises:
      UserError: a value outside its range or of another type, naming the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    n: int = 1
    number: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    thinking_budget: int | None = None
    bad_words: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    detokenize: bool = True
    stream: bool = True

    def __post_init__(self):
        self._check("temperature", lambda t: t >= 0, "0 (greedy) or a positive number")
        self._check("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1 (off)")
        self._check("min_p", lambda p: 0 <= p <= 1, "from 0 (off) to 1")
        self._check("repetition_penalty", lambda r: r > 0, "positive; 1 is off")
        for field in ("presence_penalty", "frequency_penalty"):
            self._check(field, lambda p: True, "a finite number; 0 is off")
        self._whole("top_k", lambda k: 0 <= k < 2**31, "0 (off) or a number of tokens below 2**31")
        self._whole("seed", lambda s: 0 <= s < 2**32, "a whole number from 0 to 2**32 - 1")
        self._whole("max_tokens", lambda n: n >= 1, "a whole number, at least 1")
        self._whole("min_tokens", lambda n: n >= 0, "a whole number, at least 0")
        self._whole("n", lambda n: n >= 1, "a whole number, at least 1")
        self._whole("number", lambda n: 0 <= n < 2**31, "a whole number from 0 to 2**31 - 1")
        if self.thinking_budget is not None:
            self._whole("thinking_budget", lambda n: n >= 0, "null or a number of tokens")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                self._whole(
                    field, lambda n: 0 <= n <= MAX_TOP_LOGPROBS, f"null or a whole number up to {MAX_TOP_LOGPROBS}"
                )
        for field in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, _ids(field, getattr(self, field)))
        for field in ("stop", "bad_words"):
            texts = getattr(self, field)
            if isinstance(texts, str) or any(not isinstance(text, str) or not text for text in texts):
                raise UserError(f"sampling.{field} is {texts!r}; it must be a list of texts, none of them empty")
            object.__setattr__(self, field, tuple(texts))
        if self.stop and not self.detokenize:
            raise UserError("sampling.stop needs the text of the answer; leave detokenize = False out")
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or any(isinstance(v, bool) or not _finite(v) for v in bias.values()):
            raise UserError(f"sampling.logit_bias is {bias!r}; it must map token ids to finite numbers")
        ids = _ids("logit_bias", bias)
        object.__setattr__(self, "logit_bias", dict(zip(ids, map(float, bias.values()), strict=True)))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UserError("sampling.allowed_token_ids is empty, so no token may be given; leave it out to allow all")
        if self.min_tokens > self.max_tokens:
            raise UserError(f"sampling.min_tokens = {self.min_tokens} is above max_tokens = {self.max_tokens}")

    def _whole(self, field: str, holds: Callable[[Any], bool], wanted: str) -> None:
        self._check(field, lambda n: n == int(n) and holds(n), wanted)
        object.__setattr__(self, field, int(getattr(self, field)))

    def _check(self, field: str, holds: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not _finite(value) or not holds(value):
            raise UserError(f"sampling.{field} is {value!r}; it must be {wanted}")

    @property
    def is_constrained(self) -> bool:
        """Whether the host says for each token which ones may come."""
        return self.grammar is not None or self.thinking_budget is not None or bool(self.bad_words)

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn, and not the likeliest ones."""
        return self.temperature > 0


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _ids(field: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise UserError(f"sampling.{field} is {ids!r}; it must be a list of token ids")
    ids = tuple(ids)
    if any(isinstance(i, bool) or not isinstance(i, numbers.Integral) for i in ids):
        raise UserError(f"sampling.{field} is {ids!r}; it must hold whole numbers")
    if len(ids) > MAX_LISTED_IDS:
        raise UserError(f"sampling.{field} has {len(ids)} ids; at most {MAX_LISTED_IDS} are taken")
    return tuple(int(i) for i in ids)


@dataclasses.dataclass(frozen=True)
class Request:
    """One conversation to answer.

    Attributes:
      id: chosen by the caller; no two requests in the engine have the same.
      example: the prompt, ended with the opening of an assistant turn, as `Processor.encode(...,
        generation_prompt=True)` returns it.
      adapter: name of the adapter that answers, in a model that has several; None is the base.
      priority: requests with smaller numbers begin first.
      cache_salt: requests share cached prefixes only with requests of the same salt.
    """

    id: str
    example: Example
    sampling: SamplingParams = SamplingParams()
    adapter: str | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclasses.dataclass(slots=True)
class TokenLogprob:
    """The log-probability of a token under the model's scores, before bias, penalties, temperature and filters; or in
    the distribution that it was drawn from, as `EngineConfig.logprobs` says.

    Attributes:
      top: (token, log-probability) of the likeliest tokens, best first.
      entropy: of the distribution, in nats; None for tokens of a prompt.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    entropy: float | None = None


class StepFailed(Exception):
    """A step of the engine failed, by no fault of the input as far as is known; the same request may be given again."""


@dataclasses.dataclass(slots=True)  # not frozen: that would make it four times as dear, and there is one for each token
class Event:
    """What one token did to one answer of a request.

    Attributes:
      request_id: of the request.
      index: which of the request's ``n`` answers.
      token: the token that was given, the one that ends an answer included; None where there is none, as in an abort.
      text: what became readable. Pieces join up to the text of the answer; the text of an end token is never in it.
        Where a step draws several tokens, the last of them has the text of all, unless log-probabilities are asked for.
      logprob: of the token, where asked for.
      finish_reason: None while the answer goes on.
      stop_reason: the text or the token id that ended it, where that was one of the request's; None for the
        checkpoint's own end tokens.
      error: why there is no answer, where ``finish_reason`` is "error": a `UserError`, or a `StepFailed`.
      prompt_tokens, cached_tokens: tokens of the prompt, and how many of them were not computed anew.
      prompt_logprobs: for each token of the prompt, in the first event of a request that asked for them; None for the
        first token.
    """

    request_id: str
    index: int = 0
    token: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine: all of its programs are compiled for them, by `Engine.warm_up` or at their first use.

    Attributes:
      max_slots: answers that are decoded together.
      max_model_len: tokens of a prompt and its answer together; None is the model's positions.
      page_size: tokens of a page of the cache; None is 128 on a TPU and 16 elsewhere.
      num_pages: pages of the cache; None is as many as ``max_slots`` answers of ``max_model_len`` tokens need, or as
        fit where `Engine.size_cache` finds that there is no memory for so many. Where neither that length is given nor
        `Engine.warm_up` called, as many as the first requests need, and more when one needs more alone.
      memory_fraction: share of a device's memory, or of the machine's on a CPU, that parameters, cache and programs may
        take together; None is 0.9 of a GPU's or TPU's, and no limit on a CPU.
      kv_cache_dtype: of the cache, "float8_e4m3fn" say; None is the dtype that the model computes in, float32 on a CPU.
        A narrower one holds more tokens and rounds keys and values; kernels that do not read it leave the work to XLA.
      deterministic: an answer depends on nothing that runs beside it, not even by rounding: each program has one size,
        prompts and pictures are computed one at a time, and no page of a prompt is shared. Slower.
      prefill_tokens: lengths of the prefill programs; a step computes at most the longest.
      encode_patches: sizes of the vision tower's programs; a picture of more patches than the largest is refused.
      feature_slots: vision tokens whose features are kept on the device; None is four times what the largest picture
        has.
      decode_slots: sizes of the decoding programs, the largest of them ``max_slots``; None chooses.
      prefix_cache: compute no page of a prompt twice.
      draft_tokens: tokens that are guessed from what stood before, and verified in one step; 0 for none.
      logprobs: which distribution `TokenLogprob` is of: "raw" is the model's own; "sampled" is the one that is drawn
        from, after banned tokens, temperature and filters, which policy optimisation wants. Requests with penalties or
        bias are then refused.
      decode_steps: most tokens of each answer that the device draws before the host looks at them. Fewer where they
        take longer than ``decode_seconds``, and one where the host has to choose: under grammars and with drafts.
      decode_seconds: how long a new request, or a token on its way out, may wait for such steps.
      tpot_goal: seconds between two tokens of an answer that are kept, where that is possible, while prompts of others
        are computed. None gives most tokens a second instead: answers may stand still while prompts come first.
      ahead: start each step before the tokens of the last are read.
    """

    max_slots: int = 32
    max_model_len: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    memory_fraction: float | None = None
    kv_cache_dtype: str | None = None
    deterministic: bool = False
    prefill_tokens: tuple[int, ...] = (256, 1024, 2048)
    encode_patches: tuple[int, ...] = (1024, 4096, 16384)
    feature_slots: int | None = None
    decode_slots: tuple[int, ...] | None = None
    prefix_cache: bool = True
    draft_tokens: int = 0
    logprobs: Literal["raw", "sampled"] = "raw"
    decode_steps: int = 16
    decode_seconds: float = 0.01
    tpot_goal: float | None = None
    ahead: bool = True

    def __post_init__(self):
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise UserError(f"memory_fraction is {self.memory_fraction}; it must be above 0 and at most 1")
        if self.kv_cache_dtype not in (None, *CACHE_DTYPES):
            raise UserError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; take one of {', '.join(CACHE_DTYPES)}")
        if self.tpot_goal is not None and not 0 < self.tpot_goal < math.inf:
            raise UserError(f"tpot_goal is {self.tpot_goal}; it must be a positive number of seconds")
        if self.deterministic and self.draft_tokens:
            raise UserError("deterministic and draft_tokens exclude each other: drafts are computed in other programs")


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counters and gauges of an engine, under vLLM's names without their prefix.

    Attributes:
      num_requests_running, num_requests_waiting: answers in slots, and requests before their first prefill.
      kv_cache_usage_perc, encoder_cache_usage_perc: used share of pages and of feature slots, from 0 to 1.
      prefix_cache_queries, prefix_cache_hits: tokens of prompts, and those found in the cache.
      mm_cache_queries, mm_cache_hits: pictures, and those whose features were found.
      num_preemptions: answers that gave up their pages to others and were computed anew.
      prompt_tokens, prompt_tokens_cached, generation_tokens: since the start.
      request_success: finished answers by ``finish_reason``.
      spec_decode_num_drafts, spec_decode_num_draft_tokens, spec_decode_num_accepted_tokens: guesses, their tokens, and
        those that were right.
      encoder_patches: patches that the vision tower has seen.
      compilations, compilations_after_ready: programs compiled, and those compiled after `Engine.warm_up`.
      steps: device programs run, by name.
      padding_ratio: share of a program's entries that held nothing, by name.
      host_gap_seconds: time during which no program was queued on the device though there was work.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0
    encoder_cache_usage_perc: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    mm_cache_queries: int = 0
    mm_cache_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    request_success: Mapping[str, int] = dataclasses.field(default_factory=dict)
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    encoder_patches: int = 0
    compilations: int = 0
    compilations_after_ready: int = 0
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    padding_ratio: Mapping[str, float] = dataclasses.field(default_factory=dict)
    host_gap_seconds: float = 0.0
