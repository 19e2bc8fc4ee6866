"""Documents cut to fit packed sequences, between their pieces, so that no token of text is lost or comes twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jvlm.data.content import Document, Image, Video
from jvlm.data.document_text import CHARACTER, PARAGRAPH, PIECE, WORD
from jvlm.data.packing import Example


class Limits(NamedTuple):
    """What a part of a document may have at most.

    Attributes:
      tokens: of the part, those written before it included.
      patches: of its media.
    """

    tokens: int
    patches: int


class Beginning(NamedTuple):
    """What is written before the rest of a document that was cut.

    Attributes:
      ids: the beginning of text, if the tokenizer has one.
      delimiter: the delimiter of which two neighbouring images share one; None if there is no such token.
    """

    ids: tuple[int, ...] = ()
    delimiter: int | None = None


def split(example: Example, limits: Limits, beginning: Beginning) -> list[Example]:
    """Return a document as parts that fit, each of as many pieces as go in; one part if it fits as it is.

    A text that alone is too long is cut between its paragraphs, or else its words, or else its characters. An
    image or video that alone does not fit is a part of its own, too large.

    Args:
      example: of a document, with its ``breaks``.
    """
    cuts, parts, start = _Cuts(example, limits, beginning), [], 0
    while start < example.length:
        end = cuts.end(start)
        parts.append(cuts.part(start, end))
        start = end
    return parts


def window(example: Example, limits: Limits, beginning: Beginning, bonus: float, rng: np.random.Generator) -> Example:
    """Return the part of a document that fits from a random piece on; the document if it fits as it is.

    No window begins behind the first that reaches the end, nor where only media would fit, which alone have no loss.
    Nothing is drawn for a document that fits.

    Args:
      bonus: added to the weight, 1, of a piece that is an image or video or has one behind it.
    """
    cuts = _Cuts(example, limits, beginning)
    if cuts.end(0) == example.length:
        return cuts.part(0, example.length)
    starts, weights = [0], [0.0]  # a document that nowhere has text in a window begins where it begins
    for start in cuts.starts():
        end = cuts.end(start)
        if example.loss_weights[start:end].any():
            starts.append(start)
            weights.append(1 + bonus * cuts.is_before_image(start))
        if end == example.length:
            break
    start = starts[_drawn(weights, rng)] if len(starts) > 1 else 0
    return dataclasses.replace(cuts.part(start, cuts.end(start)), records=example.records)


def split_by_media(document: Document, most: int | None) -> list[Document]:
    """Return a document as parts of at most so many images and videos, each as long as it can be."""
    if most is None or len(document.media) <= most:
        return [document]
    starts, count = [0], 0
    for index, part in enumerate(document.content):
        count += _is_media(part)
        if count > most:
            starts.append(index)
            count = 1
    return [_some(document, a, b) for a, b in zip(starts, [*starts[1:], len(document.content)], strict=True)]


def window_by_media(document: Document, most: int | None, bonus: float, rng: np.random.Generator) -> Document:
    """Return the part of a document with at most so many images and videos from a random piece on, as `window`."""
    if most is None or len(document.media) <= most:
        return document
    content = document.content
    before = np.cumsum([0, *map(_is_media, content)])
    count = 1 + int(np.argmax(before[-1] - before <= most))  # starts up to the first that reaches the end
    weights = [1 + bonus * any(map(_is_media, content[start : start + 2])) for start in range(count)]
    start = _drawn(weights, rng)
    end = int(np.searchsorted(before, before[start] + most, "right")) - 1
    return _some(document, start, end)


def _is_media(part: object) -> bool:
    return isinstance(part, Image | Video)


def _drawn(weights: list[float], rng: np.random.Generator) -> int:
    return int(rng.choice(len(weights), p=np.asarray(weights, float) / np.sum(weights)))


def _some(document: Document, start: int, end: int) -> Document:
    return dataclasses.replace(
        document,
        content=document.content[start:end],
        begins=document.begins and start == 0,
        ends=document.ends and end == len(document.content),
    )


class _Cuts:
    """Where a document may be cut, and what its parts have."""

    def __init__(self, example: Example, limits: Limits, beginning: Beginning):
        self.example, self.limits, self.beginning = example, limits, beginning
        # images and videos begun before each token
        self.reached = np.concatenate([[0], np.maximum.accumulate(example.media)])
        self.segments = _segments_of_media(example)
        self.patches = np.searchsorted(example.patch_segment_ids, self.segments, "right")[self.reached]
        self.pieces = np.append(np.flatnonzero(example.breaks == PIECE), example.length)

    def end(self, start: int) -> int:
        """Return the end of the longest part from a token on that fits."""
        found = self._last(start, self.pieces[self.pieces > start])
        if found is not None:
            return found
        end = self._piece_end(start)
        if not self.example.media[start:end].any():
            levels = self.example.breaks[:end]
            for level in (PARAGRAPH, WORD, CHARACTER):
                ends = np.flatnonzero(levels >= level)
                found = self._last(start, ends[ends > start])
                if found is not None:
                    return found
        return end

    def _last(self, start: int, ends: Int[np.ndarray, " n"]) -> int | None:
        tokens = len(self._before(start)) + ends - start
        fits = (tokens <= self.limits.tokens) & (self.patches[ends] - self.patches[start] <= self.limits.patches)
        return int(ends[fits][-1]) if fits.any() else None

    def _piece_end(self, start: int) -> int:
        return int(self.pieces[np.searchsorted(self.pieces, start, "right")])

    def starts(self) -> Iterator[int]:
        """Where a window may begin: at a piece, and inside a text that alone is too long."""
        for start in sorted({0, *map(int, self.pieces[:-1])}):
            yield start
            end = self._piece_end(start)
            if end > start and self.end(start) < end:
                levels = self.example.breaks[start + 1 : end]
                level = next((one for one in (PARAGRAPH, WORD, CHARACTER) if (levels >= one).any()), PIECE)
                yield from (int(one) for one in start + 1 + np.flatnonzero(levels >= level))

    def is_before_image(self, start: int) -> bool:
        """Whether the piece at a token is an image or video, or the one behind it is."""
        end = self._piece_end(start)
        behind = self._piece_end(end) if end < self.example.length else end
        return bool(self.example.media[start:behind].any())

    def _before(self, start: int) -> list[int]:
        """Ids written before a part: what begins a text, and the delimiter that its first image shared."""
        if start == 0:
            return []
        delimiter, tokens, media = self.beginning.delimiter, self.example.tokens, self.example.media
        shared = delimiter is not None and media[start] > media[start - 1] > 0 and tokens[start - 1] == delimiter
        return [*self.beginning.ids, *([delimiter] if shared else [])]

    def part(self, start: int, end: int) -> Example:
        """Return the tokens from ``start`` to before ``end``, and the media among them."""
        example, before = self.example, self._before(start)
        first, last = int(self.reached[start]), int(self.reached[end])
        vision_tokens = np.searchsorted(
            example.vision_segment_ids, [self.segments[first], self.segments[last]], "right"
        )
        a, b = int(self.patches[start]), int(self.patches[end])
        k, inside = len(before), slice(start, end)
        shared_media = np.array([i == self.beginning.delimiter for i in before], np.int32)

        def after(prefix: np.ndarray, values: np.ndarray) -> np.ndarray:
            return np.concatenate([prefix.astype(values.dtype), values])

        index, media = example.vision_index[inside], example.media[inside]
        windows = int(example.patch_window_ids[a - 1]) if a else 0
        return dataclasses.replace(
            example,
            tokens=after(np.asarray(before, np.int32), example.tokens[inside]),
            positions=after(
                np.repeat(np.arange(k)[:, None], 3, 1), example.positions[inside] - example.positions[start] + k
            ),
            loss_weights=after(np.zeros(k), example.loss_weights[inside]),
            turns=after(np.zeros(k), example.turns[inside]),
            vision_index=after(np.full(k, -1), np.where(index >= 0, index - vision_tokens[0], -1)),
            media=after(shared_media, np.where(media > 0, media - first, 0)),
            vision_segment_ids=example.vision_segment_ids[vision_tokens[0] : vision_tokens[1]] - self.segments[first],
            patches=example.patches[a:b],
            patch_segment_ids=example.patch_segment_ids[a:b] - self.segments[first],
            patch_window_ids=example.patch_window_ids[a:b] - windows,
            patch_positions=example.patch_positions[a:b],
            sizes=example.sizes[first:last],
            records=example.records if start == 0 else 0,
            made_to_fit=example.made_to_fit if (start, end) == (0, example.length) else "cut",
            breaks=None,
        )


def _segments_of_media(example: Example) -> Int[np.ndarray, " m"]:
    """Return the last patch segment of each image and video, from 1; of none, 0."""
    count = len(example.sizes)
    last = np.full(count + 1, -1)
    fed = example.vision_index >= 0
    np.maximum.at(last, example.media[fed], example.vision_index[fed])
    return np.concatenate([[0], example.vision_segment_ids[last[1:]]]).astype(np.int32)
