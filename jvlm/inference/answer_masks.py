"""Which tokens may come next in the answers to one request."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from jvlm.data.packing import Example
from jvlm.inference.bad_words import BadWords, word_tokens
from jvlm.inference.constrain import Constraints, TokenConstraint, fill_drafts
from jvlm.inference.grammar_text import within_pictures
from jvlm.inference.requests import Grammar, SamplingParams
from jvlm.inference.thinking import CLOSING, OPENING, ThinkingBudget


class AnswerMasks:
    """The constraint of each answer, and the bits of the tokens that may come next in it.

    Attributes:
      words: int32 [n, W].
    """

    def __init__(self, constraints: Sequence[TokenConstraint], width: int):
        self.constraints = tuple(constraints)
        self.words = np.zeros((len(self.constraints), width), np.int32)
        for constraint, words in zip(self.constraints, self.words, strict=True):
            constraint.fill(words)

    @classmethod
    def of(
        cls, constraints: Constraints, sampling: SamplingParams, ends: Collection[int], prompt: Example
    ) -> AnswerMasks | None:
        """Return the masks of a request; None for one without constraints.

        Args:
          ends: tokens that end its answers.
          prompt: its tokens tell whether the answer begins by thinking; its pictures, where boxes may be.

        Raises:
          UserError: a grammar that may not be used; a bad word without tokens.
        """
        if not sampling.is_constrained:
            return None
        grammar = sampling.grammar
        if grammar is not None:
            grammar = within_pictures(grammar, prompt, constraints.processor)
            constraints.check(grammar)
        tokens = prompt.tokens.tolist()
        found = [_constraint(constraints, sampling, grammar, ends, tokens) for _ in range(sampling.n)]
        return cls(found, constraints.words)

    def accept(self, index: int, token: int) -> bool:
        """Take the token that came in an answer. Returns whether nothing may follow it.

        Raises:
          GrammarError: the answer cannot go on.
        """
        constraint = self.constraints[index]
        constraint.accept(token)
        if constraint.is_complete:
            return True
        constraint.fill(self.words[index])
        return False

    def of_drafts(self, index: int, drafts: Sequence[int]) -> np.ndarray:
        """Return the masks of the next token and of those after each drafted one, int32 [1 + K, W]."""
        words = np.zeros((1 + len(drafts), self.words.shape[1]), np.int32)
        fill_drafts(self.constraints[index], words, drafts)
        return words


def _constraint(
    constraints: Constraints,
    sampling: SamplingParams,
    grammar: Grammar | None,
    ends: Collection[int],
    prompt: Sequence[int],
) -> TokenConstraint:
    inner = _without_bad_words(constraints, sampling, grammar, ends, prompt)
    if not sampling.bad_words:
        return inner
    words = word_tokens(sampling.bad_words, constraints.processor.tokenizer)
    return BadWords(words, constraints.free | constraints.end_bits | constraints.bits(ends), inner)


def _without_bad_words(
    constraints: Constraints,
    sampling: SamplingParams,
    grammar: Grammar | None,
    ends: Collection[int],
    prompt: Sequence[int],
) -> TokenConstraint | None:
    inner = None if grammar is None else constraints.start(grammar, ends)
    if sampling.thinking_budget is None:
        return inner
    encode = constraints.processor.tokenizer.encode
    opening = encode(OPENING, add_special_tokens=False)
    begun = OPENING in constraints.text(prompt[-2 - len(opening) :])
    return ThinkingBudget(
        constraints.free,
        constraints.bits(ends),
        encode(CLOSING, add_special_tokens=False),
        sampling.thinking_budget,
        inner,
        () if begun else opening,
    )
