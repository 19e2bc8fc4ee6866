"""Tokens that a checkpoint's generation_config.json forbids, and what it asks for that generation does not do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models.token_ids import token_ids
from jvlm.models.vlm import VLMConfig

FILE = "generation_config.json"
# Fields of transformers' GenerationConfig that change greedy answers too, and the values at which they do nothing.
# A forced first token is not among them: it is forced on an empty prompt, and a conversation's never is.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "constraints": (None,),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_decoder_ids": (None, []),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 0, 1),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class TokenRules:
    """Tokens that a checkpoint forbids.

    Attributes:
      suppressed: never given.
      suppressed_first: not given as the first token of an answer.
      unsupported: "field = value" of all that is asked for and not done.
    """

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    unsupported: tuple[str, ...] = ()


def token_rules(generation: Mapping[str, Any], ends: Collection[int]) -> TokenRules:
    """Return the rules in the values of generation_config.json, with the meanings of transformers.

    Args:
      ends: tokens that end an answer. As in transformers, ``bad_words_ids`` does not forbid one of these alone.

    Raises:
      UserError: a field of another form, naming it.
    """
    words = generation.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise UserError(f"{FILE}: bad_words_ids is {words!r}; it must be a list of lists of token ids")
    words = [token_ids(word, f"{FILE}: bad_words_ids") for word in words]
    single = [word[0] for word in words if len(word) == 1 and word[0] not in ends]
    longer = [list(word) for word in words if len(word) > 1]
    unsupported = [f"bad_words_ids = {longer} (words of several tokens)"] if longer else []
    unsupported += [
        f"{field} = {generation[field]!r}"
        for field, idle in _UNSUPPORTED.items()
        if generation.get(field) is not None and generation[field] not in idle
    ]
    return TokenRules(
        suppressed=(*token_ids(generation.get("suppress_tokens"), f"{FILE}: suppress_tokens"), *single),
        suppressed_first=token_ids(generation.get("begin_suppress_tokens"), f"{FILE}: begin_suppress_tokens"),
        unsupported=tuple(unsupported),
    )


def end_tokens(config: VLMConfig, processor: Processor) -> frozenset[int]:
    """Return the checkpoint's end tokens: those of either configuration file, and of its chat template."""
    own = token_ids(processor.generation.get("eos_token_id"), f"{FILE}: eos_token_id")
    return frozenset((*own, *config.end_token_ids, *processor.stop_ids))


def never_given(
    config: VLMConfig, processor: Processor
) -> tuple[Bool[np.ndarray, " V"], Bool[np.ndarray, " V"] | None]:
    """Return flags [V] of tokens that are never given, and of those that are not given first (None: the same).

    Prints what generation_config.json asks for and is not done.

    Raises:
      UserError: no token is left.
    """
    ids = processor.tokenizer.get_vocab().values()
    rules = token_rules(processor.generation, end_tokens(config, processor))
    banned = banned_tokens(config, ids, processor.delimiter_ids)
    mark(banned, rules.suppressed)
    if banned.all():
        raise UserError(f"{FILE} forbids every token that may be generated; see suppress_tokens and bad_words_ids")
    if rules.unsupported:
        print(f"{FILE} asks for what is not done here: {'; '.join(rules.unsupported)}", file=sys.stderr)
    if not rules.suppressed_first:
        return banned, None
    first = banned.copy()
    mark(first, rules.suppressed_first)
    return banned, first


def banned_tokens(config: VLMConfig, tokens: int | Iterable[int], marks: Sequence[int]) -> Bool[np.ndarray, " V"]:
    """Return which ids [V] have no token, or may be brought by media only, ``marks`` among them.

    Args:
      tokens: the ids that have a token; or the number of tokens, where their ids have no hole.
    """
    banned = np.ones(config.decoder.vocab_size, bool)
    mark(banned, range(tokens) if isinstance(tokens, int) else tokens, False)
    mark(banned, config.end_token_ids, False)
    mark(banned, (*config.media_token_ids, *marks))
    return banned


def mark(flags: Bool[np.ndarray, " V"], ids: Iterable[int], value: bool = True) -> None:
    """Set the flags of ids; those that the table does not have are passed over."""
    ids = np.fromiter(ids, np.int64)
    flags[ids[(ids >= 0) & (ids < len(flags))]] = value
