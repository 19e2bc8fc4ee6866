"""What the device drew, as results for the schedulers and events for whoever asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvlm.inference.active import Active, Launched
from jvlm.inference.answer import Step
from jvlm.inference.constrain import GrammarError
from jvlm.inference.device_state import Sampled
from jvlm.inference.requests import Event, TokenLogprob
from jvlm.inference.sampling import NOT_FINITE, Logprobs
from jvlm.inference.scheduling.plans import Result, Row
from jvlm.inference.scheduling.scheduler import Scheduler


@dataclasses.dataclass(frozen=True)
class Read:
    """What became of the plans that were launched together.

    Attributes:
      results: of each group, by the number of the sequence.
      broken: (group, row, answer tokens before) of those whose scores are not finite.
      ended: requests of which an answer ended.
    """

    results: dict[int, dict[int, Result]]
    events: list[Event]
    broken: list[tuple[int, Row, int]]
    ended: list[str]


def read(launched: Launched, schedulers: Sequence[Scheduler], active: Mapping[str, Active]) -> Read:
    """Wait for what was launched, and give every answer its tokens."""
    found = Read({group: {} for group in launched.plans}, [], [], [])
    for sampled in launched.sampled:
        columns = np.asarray(sampled.drawn.tokens).T.tolist()
        values = _values(sampled)
        for index, group, row, count in sampled.rows:
            tokens = _accepted(columns[index][:count], sampled.drafts.get(index))
            cut = tokens.index(NOT_FINITE) if NOT_FINITE in tokens else None
            if not schedulers[group].is_current(row):
                if cut is not None:
                    found.broken.append((group, row, row.draw + cut))
                continue
            given, ended = _give(active[row.request_id], row, tokens[:cut], values, index, found.events)
            if ended:
                found.ended.append(row.request_id)
            elif cut is not None:
                found.broken.append((group, row, row.draw + cut))
                given, ended = given + 1, True  # no token, and no other result
            found.results[group][row.sequence] = Result(tuple(tokens[:given]), ended)
    return found


def _accepted(tokens: list[int], drafts: Sequence[int] | None) -> list[int]:
    """Return the tokens that count: one that was drawn behind a draft does if the draft was drawn itself."""
    if drafts is None:
        return tokens
    count = 1
    while count < len(tokens) and tokens[count - 1] == drafts[count - 1]:
        count += 1
    return tokens[:count]


def _give(
    active: Active, row: Row, tokens: list[int], values: Logprobs | None, index: int, events: list[Event]
) -> tuple[int, bool]:
    """Give an answer its next tokens. Returns how many it took, and whether it has ended."""
    if not tokens:
        return 0, False
    sampling, scores = active.request.sampling, None
    texts, step, error = _extend(active, row.index, tokens)
    count = len(texts)
    if values is not None and sampling.logprobs is not None:
        own = Logprobs(*(x[:count, index] for x in values))
        scores = token_logprobs(own, tokens[:count], sampling.logprobs)
    prompt = len(active.spec.tokens)
    for i, text in enumerate(texts):
        event = Event(row.request_id, row.index, tokens[i], text, prompt_tokens=prompt, cached_tokens=active.cached)
        if scores is not None:
            event.logprob = scores[i]
        events.append(event)
        if not active.reported:
            active.reported = True
            event.prompt_logprobs = None if active.prompt_logprobs is None else tuple(active.prompt_logprobs)
    event.error, event.finish_reason, event.stop_reason = error, step.finish_reason, step.stop_reason
    return count, step.finish_reason is not None


def _extend(active: Active, number: int, tokens: list[int]) -> tuple[list[str], Step, GrammarError | None]:
    """Add tokens to an answer. Returns the text of each that counts, the last step, and why a constraint cannot go on.

    The last of several tokens has the text of all, unless log-probabilities tell which text belongs to which token.
    """
    answer, masks = active.answers[number], active.masks
    if masks is None and active.request.sampling.logprobs is None:
        count, step = answer.extend(tokens)
        return [*[""] * (count - 1), step.text], step, None
    texts, error = [], None
    while not answer.ended and len(texts) < len(tokens):
        token = tokens[len(texts)]
        _, step = answer.extend((token,))
        if masks is not None and step.finish_reason is None:
            try:
                if masks.accept(number, token):
                    step = answer.finish().behind(step)
            except GrammarError as problem:
                step, error = answer.finish().behind(step, "error"), problem
        texts.append(step.text)
    return texts, step, error


def _values(sampled: Sampled) -> Logprobs | None:
    """Return the log-probabilities that requests want, on the host."""
    if sampled.top < 0:
        return None
    every = sampled.drawn.logprobs
    nothing = np.zeros((*every.chosen.shape, 0))
    if not sampled.top:
        return Logprobs(np.asarray(every.chosen), np.asarray(every.entropy), nothing, nothing)
    return Logprobs(*map(np.asarray, every))


def token_logprobs(values: Any, tokens: Sequence[int], count: int, *, entropy: bool = True) -> list[TokenLogprob]:
    """Return the log-probabilities of consecutive tokens, with the ``count`` likeliest of each."""
    chosen, entropies = values.chosen.tolist(), values.entropy.tolist() if entropy else [None] * len(tokens)
    if not count:
        return [TokenLogprob(*one) for one in zip(tokens, chosen, [()] * len(tokens), entropies, strict=True)]
    tops = zip(values.top_tokens[:, :count].tolist(), values.top[:, :count].tolist(), strict=True)
    tops = [tuple(zip(*top, strict=True)) for top in tops]
    return [TokenLogprob(*one) for one in zip(tokens, chosen, tops, entropies, strict=True)]
