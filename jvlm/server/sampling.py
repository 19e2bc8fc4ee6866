"""Fields of requests to sampling parameters: defaults, bounds, and what an answer must be."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from jvlm.errors import UserError
from jvlm.inference.requests import Grammar, SamplingParams
from jvlm.server.errors import bad, of_user_error
from jvlm.server.protocol import ChatRequest, CompletionRequest, Sampling
from jvlm.server.reading import parse_json

_GREEDY = 1e-5  # a temperature below takes the likeliest token
_MOST_STOPS = 4
_MOST_GRAMMAR = 64 * 1024
_GRAMMAR_DEPTH = 32
_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
COMPLETION_TOKENS = 16  # of an answer to /v1/completions that names no number


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What sampling has to know about the model.

    Attributes:
      defaults: values of fields that a request leaves out.
      vocabulary: number of token ids.
      end_ids: the checkpoint's own end tokens.
      max_model_len: tokens of a prompt and its answer.
      max_n: most answers to a request.
      max_logprobs: most alternatives of a token.
    """

    defaults: Mapping[str, float]
    vocabulary: int
    end_ids: frozenset[int]
    max_model_len: int
    max_n: int = 8
    max_logprobs: int = 20


def default_values(generation: Mapping[str, Any]) -> dict[str, float]:
    """Return what holds where a request says nothing: the checkpoint's generation_config.json, or no change."""
    found = {name: generation.get(name) for name in _DEFAULTS}
    return {name: value if found[name] is None else found[name] for name, value in _DEFAULTS.items()}


def sampling_params(
    request: Sampling,
    facts: ModelFacts,
    prompt_tokens: int,
    *,
    grammar: Grammar | None = None,
    stop: tuple[str, ...] = (),
) -> SamplingParams:
    """Return how a request is answered.

    Args:
      prompt_tokens: of its longest prompt.
      stop: further texts that end the answer and stay in it.

    Raises:
      APIError: a value outside its range; a prompt, or an answer, that the context does not hold.
    """
    values = {name: _given(request, name, facts.defaults) for name in _DEFAULTS}
    if values["temperature"] < _GREEDY:
        values["temperature"] = 0.0
    values["top_k"] = min(max(int(values["top_k"]), 0), facts.vocabulary)
    n = request.n or 1
    if n > facts.max_n:
        raise bad(f"n is {n}; at most {facts.max_n} answers are given to a request", "n")
    most = _max_tokens(request, facts, prompt_tokens)
    if request.min_tokens > most:
        raise bad(f"min_tokens {request.min_tokens} is above the {most} tokens of the answer", "min_tokens")
    chosen, top = _logprobs(request, facts)
    stops = _stops(request.stop)
    try:
        return SamplingParams(
            **values,
            logit_bias=_bias(request.logit_bias, facts.vocabulary),
            allowed_token_ids=_ids(request.allowed_token_ids, facts.vocabulary, "allowed_token_ids"),
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
            max_tokens=most,
            min_tokens=request.min_tokens,
            stop=(*stops, *stop),
            include_stop=bool(request.include_stop_str_in_output or (stop and not stops)),
            stop_token_ids=_stop_ids(request, facts),
            ignore_eos=request.ignore_eos,
            n=n,
            logprobs=top if chosen else None,
            prompt_logprobs=request.prompt_logprobs,
            grammar=grammar,
            skip_special_tokens=request.skip_special_tokens,
            thinking_budget=getattr(request, "thinking_token_budget", None),
            bad_words=tuple(request.bad_words or ()),
        )
    except UserError as error:
        raise of_user_error(error) from error


def _given(request: Sampling, name: str, defaults: Mapping[str, float]) -> float:
    value = getattr(request, name)
    return defaults[name] if value is None else value


def _max_tokens(request: Sampling, facts: ModelFacts, prompt: int) -> int:
    limit = facts.max_model_len
    if prompt >= limit:
        raise bad(f"the prompt has {prompt} tokens, and the context {limit}, so none is left for an answer", "messages")
    asked, field = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked, field = request.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked = min(COMPLETION_TOKENS, limit) if isinstance(request, CompletionRequest) else limit - prompt
    if asked > limit:
        raise bad(f"{field} is {asked}; the context has {limit} tokens", field)
    if asked == 0:
        if not (isinstance(request, CompletionRequest) and request.echo):
            raise bad(f"{field} must be at least 1", field)
        asked = 1  # the caller wants the prompt's log-probabilities, and the token is left out
    return min(asked, limit - prompt)


def _logprobs(request: Sampling, facts: ModelFacts) -> tuple[bool, int]:
    """Whether log-probabilities are asked for, and of how many alternatives."""
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        chosen, top = bool(request.logprobs), request.top_logprobs or 0
    elif isinstance(request, CompletionRequest):
        chosen, top = request.logprobs is not None, request.logprobs or 0
    else:
        return False, 0
    if top > facts.max_logprobs or (request.prompt_logprobs or 0) > facts.max_logprobs:
        raise bad(f"at most {facts.max_logprobs} alternatives of a token are given", "logprobs")
    return chosen, top


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MOST_STOPS:
        raise bad(f"at most {_MOST_STOPS} texts end an answer", "stop")
    if not all(stops):
        raise bad("an empty text ends nothing", "stop")
    return stops


def _stop_ids(request: Sampling, facts: ModelFacts) -> tuple[int, ...] | None:
    own = _ids(request.stop_token_ids, facts.vocabulary, "stop_token_ids")
    if not own:
        return None
    return own if request.ignore_eos else tuple(sorted({*own, *facts.end_ids}))


def _ids(ids: Collection[int] | None, vocabulary: int, field: str) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if any(not 0 <= i < vocabulary for i in ids):
        raise bad(f"a token id is not below {vocabulary}", field)
    return tuple(ids)


def _bias(given: Mapping[str, float] | None, vocabulary: int) -> dict[int, float]:
    biases = {}
    for name, value in (given or {}).items():
        if not name.isascii() or not name.isdigit() or len(name) > 9 or int(name) >= vocabulary:
            raise bad(f"a token id is no number below {vocabulary}", "logit_bias")
        biases[int(name)] = min(max(value, -100.0), 100.0)
    return biases


def grammar_of(
    request: Sampling, *, after: str | None, has_image: bool, tool_call: str | None = None
) -> Grammar | None:
    """Return what an answer must be; None for free text.

    Args:
      after: text before which nothing is forced.
      has_image: whether the prompt has an image, within which boxes stay.
      tool_call: a grammar of llguidance that forces a call.

    Raises:
      APIError: several at once, or what cannot be enforced.
    """
    found = [*_of_format(request.response_format), *_of_outputs(request.structured_outputs, has_image)]
    if request.guided_json is not None:
        found.append(("guided_json", "json_schema", request.guided_json))
    if request.guided_choice is not None:
        found.append(("guided_choice", "choice", request.guided_choice))
    for field, kind in (("guided_regex", "regex"), ("regex", "regex"), ("guided_grammar", "lark"), ("ebnf", "lark")):
        value = getattr(request, field)
        if value is not None:
            found.append((field, kind, value))
    if tool_call is not None:
        found.append(("tool_choice", "lark", tool_call))
    if not found:
        return None
    if len(found) > 1:
        raise bad(f"{found[0][0]} and {found[1][0]} at once; give one of them", found[1][0])
    ((field, kind, value),) = found
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise bad("a list of texts, none of them empty", field)
        return Grammar("choice", choices=tuple(value), after=after)
    if kind in ("json_object", "boxes"):
        return Grammar(kind, after=after)
    if kind == "json_schema":
        value = _schema(value, field)
    if not isinstance(value, str) or not value:
        raise bad("not text", field)
    if len(value.encode()) > _MOST_GRAMMAR:
        raise bad(f"more than {_MOST_GRAMMAR} bytes", field)
    return Grammar(kind, value, after=after)


def _of_format(value: Mapping[str, Any] | None) -> list[tuple[str, str, Any]]:
    kind = None if value is None else value.get("type")
    if value is None or kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", "json_object", None)]
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None:
            raise bad("json_schema has no schema", "response_format.json_schema.schema")
        return [("response_format.json_schema", "json_schema", schema)]
    raise bad("use text, json_object or json_schema", "response_format.type")


def _of_outputs(value: Mapping[str, Any] | None, has_image: bool) -> list[tuple[str, str, Any]]:
    kinds = {
        "json": "json_schema",
        "regex": "regex",
        "choice": "choice",
        "grammar": "lark",
        "json_object": "json_object",
    }
    found = []
    for name, given in (value or {}).items():
        field = f"structured_outputs.{name}"
        if given is None or given is False:
            continue
        if name == "boxes":
            if not has_image:
                raise bad("boxes need an image", field)
            found.append((field, "boxes", None))
        elif name in kinds:
            found.append((field, kinds[name], given))
        else:
            raise bad(f"use one of {', '.join(kinds)}, boxes", field[:80])
    return found


def _schema(value: Any, field: str) -> str:
    if isinstance(value, str):
        if len(value.encode()) > _MOST_GRAMMAR:
            raise bad(f"more than {_MOST_GRAMMAR} bytes", field)
        value = parse_json(value.encode(), depth=_GRAMMAR_DEPTH, nodes=_MOST_GRAMMAR)
    if not isinstance(value, Mapping):
        raise bad("not a JSON schema", field)
    return json.dumps(value)
