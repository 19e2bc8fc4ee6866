"""Documents to token ids, without a chat template: which of them have a loss, and before which it may be cut."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jvlm.data.chat_format import ChatFormat
from jvlm.data.content import Document, Image, Text
from jvlm.data.control_tokens import ControlTokens
from jvlm.data.errors import ExampleError

# What begins at a token, by which a document is cut before it or not; 0 is inside a character, an image or the ends.
CHARACTER, WORD, PARAGRAPH, PIECE = 1, 2, 3, 4
_PARAGRAPH = re.compile(r"\n\s*")
_WORD = re.compile(r"\s+")


class Tokens(NamedTuple):
    """An example as tokens, with one for each image and video.

    Attributes:
      ids: of the tokens.
      weights: of their loss.
      turns: as in `jvlm.data.packing.Example`.
      breaks: of a document, what begins at each token: 0, or one of the constants of this module.
    """

    ids: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    turns: Int[np.ndarray, " n"]
    breaks: Int[np.ndarray, " n"] | None = None


class DocumentText:
    """Tokenizes documents: the beginning of text if the tokenizer has one, the pieces, the end of text.

    Text stays text: what it spells of control tokens, those of media included, is tokenized as ordinary words.

    Args:
      tokenizer: a fast transformers tokenizer.
      chat_format: says how media are written.
      control: the control tokens.
      headers: tokens that begin turns in chat templates; one of these is no beginning of text.
      end: the token that ends a document; None takes the tokenizer's end of text.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_format: ChatFormat,
        control: ControlTokens,
        headers: frozenset[str] = frozenset(),
        end: str | None = None,
    ):
        self.tokenizer, self.chat_format, self._control = tokenizer, chat_format, control
        begin = tokenizer.bos_token
        self.begin_ids = () if begin is None or begin in headers else (tokenizer.bos_token_id,)
        end_id = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)
        self.end_id = None if end_id == tokenizer.unk_token_id else end_id

    def tokenize(self, document: Document, *, prompt: bool = False) -> Tokens:
        """Return the tokens of a document: all of its text has a loss, media and what is written around them have none.

        Args:
          prompt: the document is to be continued: no end of text, and no loss.

        Raises:
          ExampleError: text that cannot be encoded, or a tokenizer without an end of text.
        """
        pieces = self._guarded(document)
        text, media, begins = self._joined(document, pieces)
        ids, first, last = self._encode(document, text, pieces)
        weights = np.ones(len(ids), np.float32)
        for start, end in media:
            weights[(first < end) & (last > start)] = 0
        breaks = _breaks(text, first, last, begins, media)
        ids, weights, breaks = (
            [np.asarray(v, d)] for v, d in ((ids, np.int32), (weights, np.float32), (breaks, np.int8))
        )
        if self.begin_ids:
            ids.insert(0, np.asarray(self.begin_ids, np.int32))
            weights.insert(0, np.zeros(len(self.begin_ids), np.float32))
            breaks.insert(0, np.zeros(len(self.begin_ids), np.int8))
        if document.ends and not prompt:
            if self.end_id is None:
                fix = "Set processor.document_end to the token that shall end documents"
                raise ExampleError(document.origin, "document", "the tokenizer has no end of text", fix)
            ids.append(np.asarray([self.end_id], np.int32))
            weights.append(np.ones(1, np.float32))
            breaks.append(np.zeros(1, np.int8))
        ids, weights, breaks = map(np.concatenate, (ids, weights, breaks))
        if prompt:
            weights = np.zeros_like(weights)
        return Tokens(ids, weights, np.zeros(len(ids), np.int32), breaks)

    def _guarded(self, document: Document) -> _Guarded:
        """Return the texts of a document, and stand-ins for the characters of what they spell of control tokens."""
        texts = [part.text for part in document.content if isinstance(part, Text)]
        suspects = [found for found in map(self._control.suspect, texts) if found]
        if not suspects:
            return _Guarded(texts, {}, None)
        try:
            stand_ins, _ = self._control.stand_ins("".join(texts))
        except ValueError as error:
            raise _not_text(document, suspects[0], f"the document holds {error} too") from error
        return _Guarded([self._control.guard(text, stand_ins) for text in texts], stand_ins, suspects[0])

    def _joined(self, document: Document, guarded: _Guarded) -> tuple[str, list[tuple[int, int]], list[int]]:
        """Return (text with placeholders, characters of each image and video, first character of each piece)."""
        style, texts = self.chat_format, iter(guarded.texts)
        written, media, begins, at, after_media = [], [], [], 0, False
        for part in document.content:
            begins.append(at)
            if isinstance(part, Text):
                own = next(texts)
                space = after_media and style.space_after_image and not (part.text[0].isspace() or part.text[0] == "<")
                own = f" {own}" if space else own
            else:
                is_image = isinstance(part, Image) or style.video is None
                own = f"{style.media_prefix}{style.image if is_image else style.video}{style.media_suffix}"
                media.append((at, at + len(own)))
            after_media = not isinstance(part, Text)
            written.append(own)
            at += len(own)
        return "".join(written), media, begins

    def _encode(self, document: Document, text: str, guarded: _Guarded):
        """(ids, first character, character after the last) of the tokens of a text."""
        if guarded.suspect is None:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
            return np.asarray(encoded["input_ids"], np.int32), *offsets.T
        try:
            return self._control.encode(text, guarded.stand_ins, add_special_tokens=False)
        except ValueError as error:
            raise _not_text(document, guarded.suspect, f"with {error} it cannot be told apart") from error


class _Guarded(NamedTuple):
    texts: list[str]
    stand_ins: dict[str, str]
    suspect: str | None


def _not_text(document: Document, suspect: str, why: str) -> ExampleError:
    problem = f"{suspect!r} cannot be written as ordinary text here: {why}"
    return ExampleError(document.origin, "document", problem, "Change the words")


def _breaks(
    text: str,
    first: Int[np.ndarray, " n"],
    last: Int[np.ndarray, " n"],
    begins: list[int],
    media: list[tuple[int, int]],
) -> Int[np.ndarray, " n"]:
    """Return what begins at each token of a text, given where its pieces begin and the characters of its media."""
    level = np.zeros(len(text) + 1, np.int8)
    level[:] = CHARACTER
    for found in _WORD.finditer(text):
        level[found.start()] = WORD
    for found in _PARAGRAPH.finditer(text):
        level[found.end()] = PARAGRAPH
    for start, end in media:
        level[start:end] = 0
    level[begins] = PIECE
    breaks = level[first]
    # a character of several tokens is cut in none of them; a token without characters belongs to the one before
    inside = np.zeros(len(first), bool)
    inside[1:] = (first[1:] < last[:-1]) | (first[1:] == last[1:])
    return np.where(inside, 0, breaks).astype(np.int8)
