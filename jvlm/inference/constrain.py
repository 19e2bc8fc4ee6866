"""Answers under a grammar: which tokens may come next, as bits for the device.

Axes: W words of 32 bits, ceil(V / 32) for a vocabulary of V.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import threading
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference import grammar_worker
from jvlm.inference.grammar_text import grammar_text, require
from jvlm.inference.requests import Grammar
from jvlm.killable_pool import KillablePool
from jvlm.units import GIB

_PASSED = 256  # grammars that are known to be fine
_TASKS = 1000  # of the checking process, after which it is replaced
_TAIL = 16  # tokens in whose text the beginning of the grammar is looked for
_BLANKS = 2  # tokens of white space between that text and the grammar


class GrammarError(UserError):
    """A grammar that cannot be followed any further; the answer ends, and is never continued as free text."""


class TokenConstraint(Protocol):
    """Decides which tokens may come next in one answer."""

    def fill(self, words: Int32[np.ndarray, " W"]) -> None:
        """Set the bits of the tokens that may come next, int32 [W]. Raises GrammarError if there are none."""

    def accept(self, token: int) -> None:
        """Take the token that came. Raises GrammarError if it may not."""

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""

    @property
    def is_complete(self) -> bool:
        """Return whether nothing but an end token may follow."""


class GrammarChecker(KillablePool):
    """Compiles grammars in a process that is killed when it takes too long, or too much memory.

    Args:
      seconds: for one grammar.
      memory: bytes that the process may take for it.
    """

    def __init__(self, *, seconds: float = 2.0, memory: int = GIB // 4):
        require("llguidance")
        self.seconds = seconds
        pebble = require("pebble")
        super().__init__(pebble, 1, _TASKS, grammar_worker.begin, (memory,))
        self.schedule(None).result()  # the process has begun, and later ones are limited to the grammar's time

    def schedule(self, text: str | None) -> concurrent.futures.Future:
        """Begin a check; of None, which always passes, without a limit of time."""
        text, limit = ("start: /a/", None) if text is None else (text, self.seconds)
        return self._pool.schedule(grammar_worker.check, args=(text,), timeout=limit)

    def check(self, text: str) -> None:
        """Raise UserError for a grammar of llguidance that cannot be compiled within the limits."""
        try:
            problem = self.schedule(text).result()
        except concurrent.futures.TimeoutError as error:
            raise UserError(f"the grammar takes more than {self.seconds} s to compile; make it smaller") from error
        except (self._expired, MemoryError) as error:
            raise UserError("the grammar takes too much memory to compile; make it smaller") from error
        if problem:
            raise UserError(f"the grammar cannot be used: {problem[:500]}")


class Constraints:
    """Makes the constraints of one model. The tokenizer is prepared at the first grammar.

    Args:
      vocab_size: rows of the model's vocabulary; ids without a token are never allowed.
      ends: tokens that end an answer: allowed where the grammar is satisfied, and nowhere else.
      banned: tokens that are never given, bool [V].
    """

    def __init__(self, processor: Processor, vocab_size: int, ends: Collection[int], banned: np.ndarray):
        self.processor, self.vocab_size, self.ends = processor, vocab_size, frozenset(ends)
        allowed = ~banned
        allowed[list(self.ends)] = False
        self.free = pack_bits(allowed)
        self.end_bits = self.bits(self.ends)
        self._tokenizer: Any = None
        self.blank_bits = np.zeros_like(self.free)
        self._checker: GrammarChecker | None = None
        self._passed: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def words(self) -> int:
        """Return W, the words of a mask."""
        return len(self.free)

    def check(self, grammar: Grammar) -> None:
        """Raise UserError for a grammar that may not be used, or not be compiled within the limits.

        Those that passed of late are not compiled again. Any thread may call it.
        """
        text = grammar_text(grammar, self.processor)
        with self._lock:
            if text in self._passed:
                self._passed.move_to_end(text)
                return
            if self._checker is None:
                self._checker = GrammarChecker()
        self._checker.check(text)
        with self._lock:
            self._passed[text] = None
            if len(self._passed) > _PASSED:
                self._passed.popitem(last=False)

    def prepare(self, grammar: Grammar) -> None:
        """Do what takes long for a grammar, so that `start` does not: any thread may call it. Raises UserError."""
        self.check(grammar)
        self._prepare()

    def start(self, grammar: Grammar, ends: Collection[int] | None = None) -> GrammarConstraint:
        """Return the constraint of one answer. The grammar has passed `check`.

        Args:
          ends: tokens that end this answer; None: the model's.
        """
        self._prepare()
        library = require("llguidance")
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._tokenizer, grammar_text(grammar, self.processor), log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {matcher.get_error()[:500]}")
        return GrammarConstraint(self, matcher, grammar.after, self.ends if ends is None else frozenset(ends))

    def close(self) -> None:
        """Stop the process that checks grammars."""
        with self._lock:
            if self._checker is not None:
                self._checker.close()
                self._checker = None

    def bits(self, tokens: Collection[int]) -> np.ndarray:
        """Return the bits of some tokens, int32 [W]."""
        return pack_bits(np.isin(np.arange(self.vocab_size), list(tokens)))

    def is_blank(self, token: int) -> bool:
        """Return whether a token is white space."""
        return bool(self.blank_bits[token // 32] >> (token % 32) & 1)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self.processor.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _prepare(self) -> None:
        with self._lock:
            if self._tokenizer is not None:
                return
            backend = copy.copy(self.processor.tokenizer.backend_tokenizer)
            backend.no_padding()
            backend.no_truncation()
            tokenizer = require("llguidance").LLTokenizer(
                backend.to_str(), n_vocab=self.vocab_size, eos_token=sorted(self.ends) or None
            )
            blank = np.zeros(self.vocab_size, bool)
            for token in np.flatnonzero(unpack_bits(self.free, self.vocab_size)).tolist():
                text = tokenizer.decode_bytes([token])
                blank[token] = bool(text) and not text.strip(b" \n\r\t")
            self.blank_bits = pack_bits(blank)
            self._tokenizer = tokenizer


class GrammarConstraint:
    """Follows one answer through its grammar.

    Args:
      after: text that must have come before the grammar begins; before it any token but an end may come.
      ends: tokens that end the answer.
    """

    def __init__(self, constraints: Constraints, matcher: Any, after: str | None, ends: frozenset[int]):
        self._all, self._matcher, self._after, self._ends = constraints, matcher, after, ends
        self._end_bits = constraints.bits(ends)
        self._tokens: list[int] = []
        self._kinds: list[str] = []  # of each token: "free", "blank", "grammar" or "end"
        self._count = dict.fromkeys(("free", "blank", "grammar", "end"), 0)
        self._begun = after is None
        self._mask = np.zeros(constraints.words, np.int32)

    @property
    def is_complete(self) -> bool:
        """Return whether nothing but an end token may follow."""
        return self._begun and self._matcher.is_stopped()

    def fill(self, words: Int32[np.ndarray, " W"]) -> None:
        """Set the bits of the tokens that may come next, int32 [W]. Raises GrammarError if there are none."""
        words[:] = self._all.free
        if not self._begun:
            words &= ~self._end_bits
            return
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        words &= self._mask
        if self._matcher.is_accepting():
            words |= self._end_bits
        if self._may_be_blank():
            words |= self._all.blank_bits
        if not words.any():
            raise GrammarError("no token of the model continues the grammar")

    def accept(self, token: int) -> None:
        """Take the token that came. Raises GrammarError if it may not."""
        kind = self._kind(token)
        if kind == "grammar":
            self._matcher.consume_token(token)
            self._check()
        self._tokens.append(token)
        self._kinds.append(kind)
        self._count[kind] += 1
        if not self._begun:
            self._begun = self._after_stands()

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        if not count:
            return
        taken = self._kinds[-count:]
        del self._tokens[-count:], self._kinds[-count:]
        for kind in taken:
            self._count[kind] -= 1
        if "grammar" in taken and not self._matcher.rollback(taken.count("grammar")):
            self._check()
        if "free" in taken:
            self._begun = self._after_stands()

    def _kind(self, token: int) -> str:
        if not self._begun:
            return "free"
        if token in self._ends and self._matcher.is_accepting():
            return "end"
        if self._may_be_blank() and self._all.is_blank(token) and not self._matcher.validate_tokens([token]):
            return "blank"
        return "grammar"

    def _may_be_blank(self) -> bool:
        """Return whether white space may stand here, between the text before the grammar and the grammar."""
        return self._after is not None and self._count["blank"] < _BLANKS and not self._count["grammar"]

    def _after_stands(self) -> bool:
        return self._after in self._all.text(self._tokens[-_TAIL:])

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {self._matcher.get_error()[:500]}")


def fill_drafts(constraint: TokenConstraint, words: Int32[np.ndarray, "K W"], drafts: Sequence[int]) -> int:
    """Set the masks of a verifying step, int32 [1 + K, W]: of the next token, and after each of K drafted ones.

    Returns:
      how many drafted tokens the constraint allows; masks behind those are the last one's. The constraint is left as
      it was.
    """
    constraint.fill(words[0])
    allowed = 0
    for token in drafts:
        if not words[allowed][token // 32] >> (token % 32) & 1:
            break
        constraint.accept(token)
        if constraint.is_complete:
            constraint.rollback(1)
            break
        allowed += 1
        constraint.fill(words[allowed])
    constraint.rollback(allowed)
    words[allowed + 1 :] = words[allowed]
    return allowed


def pack_bits(flags: Bool[np.ndarray, " V"]) -> Int32[np.ndarray, " W"]:
    """Return bool [V] as int32 [ceil(V / 32)], the first flag in the lowest bit of the first word."""
    padded = np.zeros(-(-len(flags) // 32) * 32, bool)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)


def unpack_bits(words: Int32[np.ndarray, " W"], count: int) -> Bool[np.ndarray, " V"]:
    """Return the first flags of int32 words, bool [count]."""
    return np.unpackbits(words.astype("<i4").view(np.uint8), bitorder="little")[:count].astype(bool)


def forced(words: Int32[np.ndarray, " W"], token: int) -> None:
    """Let one token alone come next."""
    words[:] = 0
    words[token // 32] = np.uint32(1 << token % 32).astype(np.int32)
