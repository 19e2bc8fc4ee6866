"""Conversations into sequences of fixed shape, over tokens and patches together."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from jvlm.data.boxes import Sizes
from jvlm.data.errors import ExampleError, Origin, Rejected
from jvlm.data.image_processor import MediaPatches
from jvlm.data.recycled import recycled
from jvlm.data.unread_patches import UnreadPatches, joined_patches
from jvlm.models.packed_batch import PackedBatch

_SMALL = 50  # an example of less than this part of a sequence is small
_MANY, _SEEDS = 512, 4  # examples from which on, and seeds with which, orders are drawn


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation or document as arrays: s tokens, p patches of c values.

    Attributes:
      turns: number of the last assistant turn begun at each token, from 1; 0 before the first, and in documents.
      vision_index: which feature feeds the token; -1 for text.
      media: number of the image or video that the token stands for, from 1, delimiters included; 0 for text.
      vision_segment_ids: segment of each vision token, as in `MediaPatches`, numbered through all media.
      patch_segment_ids: segment of each patch, likewise.
      patch_window_ids: attention window of each patch, likewise.
      sizes: of each image and video.
      source: number of its data source among `DataConfig.sources`; -1 for none.
      records: examples of the data that it holds: 1; 0 for what is left of a document that was cut.
      is_document: whether it has no turns.
      made_to_fit: how it was made to fit a sequence.
      breaks: of a document that can still be cut, what begins at each token: see `jvlm.data.document_text`.
      segments: number of the segment of each token, from 1, where it holds several conversations
        (`jvlm.data.segments`); None where it is one.
      values: numbers that the task wants to know of each segment; empty for none.
    """

    tokens: np.ndarray
    positions: np.ndarray
    loss_weights: np.ndarray
    turns: np.ndarray
    vision_index: np.ndarray
    media: np.ndarray
    vision_segment_ids: np.ndarray
    patches: np.ndarray | UnreadPatches
    patch_segment_ids: np.ndarray
    patch_window_ids: np.ndarray
    patch_positions: np.ndarray
    sizes: tuple[Sizes, ...]
    origin: Origin
    source: int = -1
    records: int = 1
    is_document: bool = False
    made_to_fit: Literal["no", "cut", "truncated", "shrunk"] = "no"
    breaks: np.ndarray | None = None
    segments: np.ndarray | None = None
    values: tuple[Mapping[str, float], ...] = ()

    @property
    def num_segments(self) -> int:
        """Conversations in it."""
        return 1 if self.segments is None else int(self.segments[-1])

    @property
    def longest_segment(self) -> int:
        """Tokens of its longest conversation."""
        return self.length if self.segments is None else int(np.bincount(self.segments).max())

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_patches(self) -> int:
        return len(self.patches)

    @property
    def largest_image(self) -> int:
        """Patches of the largest image, tile or video frame."""
        return int(np.bincount(self.patch_segment_ids).max()) if self.num_patches else 0


def join_media(media: Sequence[MediaPatches], patch_values: int, position_values: int) -> dict[str, np.ndarray]:
    """Return the patch arrays of an `Example` from its media in order."""
    segments, windows, patch_segment_ids, patch_window_ids, vision_segment_ids = 0, 0, [], [], []
    for item in media:
        vision_segment_ids.append(item.token_segment_ids + segments)
        patch_segment_ids.append(item.segment_ids + segments)
        patch_window_ids.append(item.window_ids + windows)
        segments, windows = int(patch_segment_ids[-1][-1]), int(patch_window_ids[-1][-1])
    none = np.zeros(0, np.int32)
    return {
        "patches": joined_patches([m.patches for m in media], patch_values),
        "vision_segment_ids": np.concatenate([none, *vision_segment_ids]),
        "patch_segment_ids": np.concatenate([none, *patch_segment_ids]),
        "patch_window_ids": np.concatenate([none, *patch_window_ids]),
        "patch_positions": np.concatenate([np.zeros((0, position_values), np.int32), *(m.positions for m in media)]),
    }


def bucket(size: int, step: int) -> int:
    """Return the smallest of step x (1, 2, 3, 4, 6, 8, 12, 16, 24, ...) that holds ``size``."""
    units, power = -(-size // step), 1
    while True:
        for candidate in (power, power + power // 2):
            if candidate >= units:
                return candidate * step
        power *= 2


def patch_step(group: int, least: int) -> int:
    """Return the smallest number of patches from ``least`` on that whole groups fill: a step for `bucket`."""
    return -(-least // group) * group


def check_fits(
    example: Example,
    seq_len: int,
    max_patches: int,
    max_length: int | None = None,
    max_image_patches: int | None = None,
) -> None:
    """Raise ExampleError if the conversation does not fit such a sequence, or breaks a promise made to attention.

    Attention is compiled for conversations of ``max_length`` tokens and images of ``max_image_patches`` at most; what
    is longer would be cut without a word.
    """
    limit = min(seq_len, max_length or seq_len)
    if example.segments is not None and example.length > seq_len >= limit >= example.longest_segment:
        raise ExampleError(
            example.origin,
            "messages",
            f"{example.length} tokens of {example.num_segments} answers with their prompts do not fit {seq_len} "
            "together",
            "Raise data.seq_len, or make the images smaller",
        )
    if example.longest_segment > limit:
        images = int((example.vision_index >= 0).sum())
        share = f" ({images} of them stand for images)" if images else ""
        raise ExampleError(
            example.origin,
            "messages",
            f"{example.longest_segment} tokens do not fit {limit}{share}",
            "Raise data.seq_len (and data.max_length), make the images smaller, or set data.on_too_long to shrink "
            "(images are resized) or truncate (turns are left out)",
        )
    if example.num_patches > max_patches:
        raise ExampleError(
            example.origin,
            "images",
            f"{example.num_patches} patches do not fit {max_patches}",
            "Raise data.max_patches, make the images smaller, or set data.on_too_long to shrink",
        )
    if max_image_patches is not None and example.largest_image > max_image_patches:
        raise ExampleError(
            example.origin,
            "images",
            f"an image of {example.largest_image} patches, where none may have more than {max_image_patches}",
            "Raise data.max_image_patches, make the images smaller, or set data.on_too_long to shrink",
        )


def truncate(example: Example, max_tokens: int, max_patches: int | None = None) -> Example | None:
    """Drop whole turns from the end until the conversation fits; never cuts a turn or an image.

    Returns None when not even the first assistant turn fits. Media behind the cut go with their tokens.
    """
    for turn in range(int(example.turns.max(initial=0)), 0, -1):
        end = _end_of(example, turn)
        if end is not None and end <= max_tokens:
            shorter = _begin_of(example, end)
            if max_patches is None or shorter.num_patches <= max_patches:
                return dataclasses.replace(shorter, made_to_fit="truncated")
    return None


def _begin_of(example: Example, end: int) -> Example:
    """Return the first ``end`` tokens, and the media that stand among them."""
    last = int(example.vision_index[:end].max(initial=-1))
    segment = int(example.vision_segment_ids[last]) if last >= 0 else 0
    vision_tokens = int(np.searchsorted(example.vision_segment_ids, segment, "right"))
    patches = int(np.searchsorted(example.patch_segment_ids, segment, "right"))
    media = int(example.media[:end].max(initial=0))
    return dataclasses.replace(
        example,
        tokens=example.tokens[:end],
        positions=example.positions[:end],
        loss_weights=example.loss_weights[:end],
        turns=example.turns[:end],
        vision_index=example.vision_index[:end],
        media=example.media[:end],
        vision_segment_ids=example.vision_segment_ids[:vision_tokens],
        patches=example.patches[:patches],
        patch_segment_ids=example.patch_segment_ids[:patches],
        patch_window_ids=example.patch_window_ids[:patches],
        patch_positions=example.patch_positions[:patches],
        sizes=example.sizes[:media],
    )


def _end_of(example: Example, turn: int) -> int | None:
    """Return the end of the loss tokens of an assistant turn; None if it has none."""
    inside = np.flatnonzero((example.turns == turn) & (example.loss_weights > 0))
    return int(inside[-1]) + 1 if inside.size else None


def first_fit(examples: Sequence[Example], seq_len: int, max_patches: int) -> list[list[int]]:
    """Return the indices of each sequence's examples, in order; each goes to the first sequence with space for both."""
    sequences: list[list[int]] = []
    space: list[list[int]] = []
    for index, example in enumerate(examples):
        for sequence, left in zip(sequences, space, strict=True):
            if example.length <= left[0] and example.num_patches <= left[1]:
                sequence.append(index)
                left[0] -= example.length
                left[1] -= example.num_patches
                break
        else:
            sequences.append([index])
            space.append([seq_len - example.length, max_patches - example.num_patches])
    return sequences


def best_fit_decreasing(examples: Sequence[Example], seq_len: int, max_patches: int) -> list[list[int]]:
    """As `first_fit`, longest first, each into the fullest sequence that still has space."""
    order = sorted(range(len(examples)), key=lambda i: (-_load(examples[i], seq_len, max_patches), i))
    return _best_fit(examples, order, seq_len, max_patches)


def best_fit(examples: Sequence[Example], seq_len: int, max_patches: int) -> list[list[int]]:
    """Return the packing with the fewest sequences of several that are tried until one has as few as can be.

    They are `best_fit_decreasing`, the order given, `one_by_one`, and of many examples `in_drawn_order` for some seeds.
    """
    fewest = _fewest(examples, seq_len, max_patches)
    best = best_fit_decreasing(examples, seq_len, max_patches)
    tries = [_as_given, one_by_one]
    if len(examples) >= _MANY:
        tries += [
            functools.partial(in_drawn_order, seed=seed, small_last=small_last)
            for seed in range(_SEEDS)
            for small_last in (False, True)
        ]
    for pack in tries:
        if len(best) <= fewest:
            break
        best = min(best, pack(examples, seq_len, max_patches), key=len)
    return best


def in_drawn_order(
    examples: Sequence[Example], seq_len: int, max_patches: int, seed: int, *, small_last: bool = False
) -> list[list[int]]:
    """Place examples in an order drawn from a seed, each where the scarcer of tokens and patches is nearly used up.

    Every sequence gets some of all kinds so, and neither its tokens nor its patches run out long before the others.

    Args:
      small_last: those below 2 % of a sequence come last, the longest first, and fill what is left.
    """
    sizes = np.array([(e.length, e.num_patches) for e in examples], np.int64).reshape(-1, 2)
    space = np.array([seq_len, max(max_patches, 1)], np.int64)
    unit = space[::-1]  # which makes both the same, in whole numbers: the same on every machine
    order = np.random.default_rng(seed).permutation(len(sizes))
    if small_last:
        load = (sizes * unit).max(axis=1, initial=0)[order]
        is_small = load * _SMALL < int(space.prod())
        order = np.concatenate([order[~is_small], order[is_small][np.argsort(-load[is_small], kind="stable")]])
    sequences: list[list[int]] = []
    left = np.empty((len(sizes), 2), np.int64)
    for index in order.tolist():
        able = np.flatnonzero((left[: len(sequences)] >= sizes[index]).all(axis=1))
        if len(able):
            chosen = int(able[np.argmin(((left[able] - sizes[index]) * unit).max(axis=1))])
            sequences[chosen].append(index)
            left[chosen] -= sizes[index]
        else:
            left[len(sequences)] = space - sizes[index]
            sequences.append([index])
    return sequences


def one_by_one(examples: Sequence[Example], seq_len: int, max_patches: int) -> list[list[int]]:
    """Fill a sequence at a time, each time with the example that leaves the least of tokens and patches.

    What is left counts squared, and in proportion to how scarce it is in all examples: so sequences get tokens and
    patches as the examples have them, and those without images do not end up among themselves (norm-based greedy of
    Panigrahy et al., Heuristics for Vector Bin Packing, 2011).
    """
    sizes = np.array([(e.length, e.num_patches) for e in examples], np.int64).reshape(-1, 2)
    space = np.array([seq_len, max(max_patches, 1)], np.int64)
    # whole numbers until the last division: the same on every machine
    tokens, patches = (int(total) * int(other) for total, other in zip(sizes.sum(0), space[::-1], strict=True))
    weights = np.array([tokens, patches]) / max(tokens, patches, 1)
    waiting = np.arange(len(sizes))
    sequences: list[list[int]] = []
    while len(waiting):
        sequence: list[int] = []
        left, able = space.copy(), np.arange(len(waiting))
        while True:
            able = able[(sizes[waiting[able]] <= left).all(axis=1)]
            if not len(able):
                break
            after = (left - sizes[waiting[able]]) / space
            chosen = int(np.argmin(after[:, 0] ** 2 * weights[0] + after[:, 1] ** 2 * weights[1]))
            sequence.append(int(waiting[able[chosen]]))
            left -= sizes[sequence[-1]]
            able = np.delete(able, chosen)
        sequences.append(sequence)
        waiting = np.setdiff1d(waiting, sequence, assume_unique=True)
    return sequences


def _as_given(examples: Sequence[Example], seq_len: int, max_patches: int) -> list[list[int]]:
    return _best_fit(examples, range(len(examples)), seq_len, max_patches)


def _load(example: Example, seq_len: int, max_patches: int) -> float:
    return max(example.length / seq_len, example.num_patches / max(max_patches, 1))


def _fewest(examples: Sequence[Example], seq_len: int, max_patches: int) -> int:
    """Sequences that any packing takes at least."""
    tokens, patches = sum(e.length for e in examples), sum(e.num_patches for e in examples)
    return max(-(-tokens // seq_len), -(-patches // max(max_patches, 1)))


def _best_fit(examples: Sequence[Example], order: Iterable[int], seq_len: int, max_patches: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    space: list[list[int]] = []
    for index in order:
        example = examples[index]
        tokens, patches = example.length, example.num_patches
        open_sequences = [(left[0], r) for r, left in enumerate(space) if tokens <= left[0] and patches <= left[1]]
        if open_sequences:
            _, r = min(open_sequences)
            sequences[r].append(index)
            space[r][0] -= tokens
            space[r][1] -= patches
        else:
            sequences.append([index])
            space.append([seq_len - tokens, max_patches - patches])
    return sequences


def _copied(example: Example, out: np.ndarray) -> None:
    out[:] = example.patches


def assemble(
    sequences: Sequence[Sequence[Example]],
    seq_len: int,
    max_patches: int,
    *,
    patch_values: int | None = None,
    position_values: int | None = None,
    max_segment_length: int | None = None,
    max_image_patches: int | None = None,
    write: Callable[[Example, np.ndarray], None] = _copied,
    array: Callable[[tuple[int, ...]], np.ndarray] = recycled,
) -> PackedBatch:
    """Lay out sequences of examples as one batch. Sequences may be empty.

    Args:
      patch_values, position_values: numbers in a flattened patch, and those that say where it is; None takes them
        from the examples, which must not all be missing then.

    Args:
      write: is given each example that has patches and where in the batch they go.
      array: makes the array of patches.

    Raises:
      ExampleError: an example longer than ``max_segment_length``, or an image of more than ``max_image_patches``.
    """
    B = len(sequences)
    for example in (e for sequence in sequences for e in sequence):
        check_fits(example, seq_len, max_patches, max_segment_length, max_image_patches)
    if patch_values is None:
        patch_values = next(e.patches.shape[1] for sequence in sequences for e in sequence)
    if position_values is None:
        position_values = next(e.patch_positions.shape[1] for sequence in sequences for e in sequence)
    batch = PackedBatch(
        tokens=np.zeros((B, seq_len), np.int32),
        segment_ids=np.zeros((B, seq_len), np.int32),
        positions=np.zeros((B, seq_len, 3), np.int32),
        loss_weights=np.zeros((B, seq_len), np.float32),
        patches=array((B, max_patches, patch_values)),
        patch_segment_ids=np.zeros((B, max_patches), np.int32),
        patch_window_ids=np.zeros((B, max_patches), np.int32),
        patch_positions=np.zeros((B, max_patches, position_values), np.int32),
        vision_index=np.full((B, seq_len), -1, np.int32),
        max_segment_length=max_segment_length,
        max_image_patches=max_image_patches,
    )
    for b, sequence in enumerate(sequences):
        s = p = vision_tokens = images = windows = segments = 0
        for example in sequence:
            S, P = slice(s, s + example.length), slice(p, p + example.num_patches)
            batch.tokens[b, S] = example.tokens
            batch.segment_ids[b, S] = segments + (1 if example.segments is None else example.segments)
            batch.positions[b, S] = example.positions
            batch.loss_weights[b, S] = example.loss_weights
            batch.vision_index[b, S] = np.where(example.vision_index >= 0, example.vision_index + vision_tokens, -1)
            batch.patch_segment_ids[b, P] = example.patch_segment_ids + images
            batch.patch_window_ids[b, P] = example.patch_window_ids + windows
            batch.patch_positions[b, P] = example.patch_positions
            if example.num_patches:
                write(example, batch.patches[b, P])
                vision_tokens += len(example.vision_segment_ids)
                images += int(example.patch_segment_ids[-1])
                windows += int(example.patch_window_ids[-1])
            s, p, segments = S.stop, P.stop, segments + example.num_segments
        batch.patches[b, p:] = 0
    return batch


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """What the pipeline yields: a batch, and what is known about its data.

    Attributes:
      conversations: examples of the data in the batch; a document that was cut counts with its first part.
      parts: examples in the batch that are parts of documents that were cut.
      by_source: of ``conversations``, how many are of each source of a mixture.
      rejected: examples left out while these were gathered.
      origins: for each sequence of the batch, where its segments 1, 2, ... came from.
      sources: for each sequence of the batch, the number of the data source of its segments; -1 for none.
      source_names: names of the data sources by number; empty where they are not told apart.
      values: for each sequence of the batch, the `Example.values` of its segments; of no segment where it has none.
    """

    batch: PackedBatch
    conversations: int
    rejected: tuple[Rejected, ...]
    origins: tuple[tuple[Origin, ...], ...] = ()
    sources: tuple[tuple[int, ...], ...] = ()
    source_names: tuple[str, ...] = ()
    parts: int = 0
    by_source: Mapping[str, int] = dataclasses.field(default_factory=dict)
    values: tuple[tuple[Mapping[str, float], ...], ...] = ()


def packed_sequences(
    batch: PackedBatch,
    sequences: Sequence[Sequence[Example]],
    rejected: Iterable[Rejected],
    source_names: tuple[str, ...],
) -> PackedSequences:
    """Return a batch with what is known about the examples of its sequences."""
    examples = [example for sequence in sequences for example in sequence]
    by_source: Counter[str] = Counter()
    for example in examples:
        by_source[example.origin.source] += example.records
    return PackedSequences(
        batch,
        conversations=sum(example.records for example in examples),
        rejected=tuple(rejected),
        origins=tuple(tuple(example.origin for example in _by_segment(sequence)) for sequence in sequences),
        sources=tuple(tuple(example.source for example in _by_segment(sequence)) for sequence in sequences),
        source_names=source_names,
        parts=sum(example.made_to_fit == "cut" for example in examples),
        by_source=dict(by_source),
        values=tuple(tuple(value for example in sequence for value in example.values) for sequence in sequences),
    )


def _by_segment(sequence: Sequence[Example]) -> list[Example]:
    """Return the example of each segment of a sequence."""
    return [example for example in sequence for _ in range(example.num_segments)]
