"""Control tokens come from the chat template alone: in text from outside their spellings stay ordinary text."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

# Private-use characters, from which stand-ins are taken that an example's own text does not hold.
_PRIVATE = range(0xF0000, 0xFFFFE)
# Noncharacters of Unicode: the tokenizer's copy spells control tokens with these.
_SPELLING = (
    *map(chr, range(0xFDD0, 0xFDF0)),
    *(chr(plane << 16 | last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF)),
)
_SPELLED = re.compile(f"[{''.join(_SPELLING)}]")
_LETTERS = 3
_MAKING = threading.Lock()


class ControlTokens:
    """The control tokens of a tokenizer: what may be mistaken for one, and encoding that does not mistake it.

    Text is guarded before the template is rendered: one character of each spelling of a control token is exchanged for
    a private-use character (the same number of characters). Control tokens in the rendering are then the template's.

    Args:
      tokenizer: a fast transformers tokenizer.
      names: the control tokens, of its added tokens.
    """

    def __init__(self, tokenizer: Any, names: Iterable[str]):
        self.names = frozenset(names)
        self.pattern = any_of(self.names)
        self._backend = tokenizer.backend_tokenizer
        self._copy: tuple[Any, dict[str, str]] | None = None
        # a token cut in two, one part of it at the end of a text and the other written beside it
        cuts = [(name[:n], name[n:]) for name in self.names for n in range(1, len(name))]
        self._heads = tuple({head for head, _ in cuts if not head.isalnum()})
        self._tails = tuple({tail for _, tail in cuts if not tail.isalnum()})
        self._letters = sorted(set("".join(self.names)))
        normalized = {t.content for t in tokenizer.added_tokens_decoder.values() if t.normalized} & self.names
        self._normalizer = self._backend.normalizer if normalized else None

    def suspect(self, text: str) -> str | None:
        """Return what of a text could become a control token, alone or beside what a template writes; None if none."""
        match = self.pattern.search(text)
        if match is None and self._normalizer is not None:
            match = self.pattern.search(self._normalizer.normalize_str(text))
        if match:
            return match[0]
        text = text.strip()
        if text.endswith(self._heads):
            return text[-1]
        return text[0] if text.startswith(self._tails) else None

    def stand_ins(self, text: str, more: int = 0) -> tuple[dict[str, str], str]:
        """(character of control tokens -> its stand-in, ``more`` further characters), none of them in the text.

        Raises:
          ValueError: the text holds private-use characters everywhere.
        """
        size = len(self._letters) + more
        used = {ord(character) for character in set(text) if ord(character) >= _PRIVATE.start}
        for first in range(_PRIVATE.start, _PRIVATE.stop - size, size or 1):
            if used.isdisjoint(range(first, first + size)):
                free = [chr(code) for code in range(first, first + size)]
                return dict(zip(self._letters, free, strict=False)), "".join(free[len(self._letters) :])
        raise ValueError("private-use characters of all blocks (U+F0000 to U+FFFFD)")

    def guard(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """Return the text with a stand-in in each spelling of a control token, and where one may be cut at its ends."""

        def exchange(match: re.Match) -> str:
            return stand_ins[match[0][0]] + match[0][1:]

        while self.pattern.search(text):
            text = self.pattern.sub(exchange, text)
        words = text.strip()
        at = text.find(words) if words else 0
        if words.endswith(self._heads):
            last = at + len(words) - 1
            text = text[:last] + stand_ins[text[last]] + text[last + 1 :]
        if words.startswith(self._tails) and text[at] in stand_ins:
            text = text[:at] + stand_ins[text[at]] + text[at + 1 :]
        return text

    def differ(self, text: str, guarded: str) -> bool:
        """Whether the tokenizer may find other control tokens in a rendering than in the same one from guarded text."""
        if self._normalizer is not None:
            return True
        spans, own = ([match.span() for match in self.pattern.finditer(t)] for t in (text, guarded))
        return spans != own

    def encode(
        self, text: str, stand_ins: Mapping[str, str], *, add_special_tokens: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int32, first and last character of each token) of a guarded rendering.

        Raises:
          ValueError: this tokenizer cannot write a control token's spelling as ordinary text; says why.
        """
        odd = _SPELLED.search(text)
        if odd:
            raise ValueError(f"U+{ord(odd[0]):X}, which is no character,")
        copy, spelling = self._respelled
        pieces, ends, shifts, at, shift = [], [], [0], 0, 0
        for match in self.pattern.finditer(text):
            pieces += [text[at : match.start()], spelling[match[0]]]
            at = match.end()
            ends.append(at - shift - len(match[0]) + _LETTERS)
            shift += len(match[0]) - _LETTERS
            shifts.append(shift)
        originals = {ord(stand_in): letter for letter, stand_in in stand_ins.items()}
        encoded = copy.encode("".join([*pieces, text[at:]]).translate(originals), add_special_tokens=add_special_tokens)
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        offsets += np.asarray(shifts)[np.searchsorted(np.asarray(ends, np.int64), offsets, side="right")]
        return np.asarray(encoded.ids, np.int32), *offsets.T

    @property
    def _respelled(self) -> tuple[Any, dict[str, str]]:
        """(the tokenizer with every control token spelled as no text is, name -> spelling)."""
        # made by one of the threads that read examples, where an example needs it: a large one takes seconds
        with _MAKING:
            self._copy = self._copy or self._respell()
        return self._copy

    def _respell(self) -> tuple[Any, dict[str, str]]:
        from tokenizers import Tokenizer

        letters = itertools.product(_SPELLING, repeat=_LETTERS)
        spelling = {name: "".join(next(letters)) for name in sorted(self.names)}
        data = json.loads(self._backend.to_str())
        model, added = data["model"], data["added_tokens"]
        data["truncation"] = data["padding"] = None
        for token in added:
            token["content"] = spelling.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelling.get(piece, piece): number for piece, number in model["vocab"].items()}
            # ids behind a gap would otherwise move up
            model["vocab"] |= {token["content"]: token["id"] for token in added}
        else:
            model["vocab"] = [[spelling.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in spelling:
            model["unk_token"] = spelling[model["unk_token"]]
        copy = Tokenizer.from_str(json.dumps(data))
        moved = [token["id"] for token in added if copy.token_to_id(token["content"]) != token["id"]]
        if moved:
            raise ValueError(f"added tokens whose ids depend on their spelling ({moved})")
        return copy, spelling


def any_of(names: Iterable[str]) -> re.Pattern:
    """Return a pattern of any of the names, the longest first; of none, one that matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def is_paired(name: str, names: Iterable[str]) -> bool:
    """Whether a token is one of a pair of tags around words, as <think> and </think> are."""
    partner = name.replace("</", "<", 1) if name.startswith("</") else name.replace("<", "</", 1)
    return partner != name and partner in names


def change_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change_strings(key, change): change_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [change_strings(item, change) for item in value]
    return value
