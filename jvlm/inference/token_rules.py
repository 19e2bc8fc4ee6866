"""Tokens that a checkpoint's generation_config.json forbids, and what it asks for that generation does not do."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jvlm.errors import UserError
from jvlm.models.token_ids import token_ids

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
