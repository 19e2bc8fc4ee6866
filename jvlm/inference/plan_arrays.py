"""Plans of the scheduler as the arrays that the programs take, on the host.

Axes as in `jvlm.inference.programs`. A group's plan fills its row, or its share of the rows; others are padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from jvlm.data.packing import Example
from jvlm.inference import programs, sampling
from jvlm.inference.programs import Chunks, DecodeRows
from jvlm.inference.scheduling.plans import Chunk, Decode
from jvlm.inference.scheduling.sequence_spec import Media
from jvlm.inference.shapes import Shapes, smallest
from jvlm.models.packed_batch import PackedBatch


@dataclasses.dataclass(frozen=True)
class ImageMemory:
    """How a decoder reads images beside the text.

    Attributes:
      reads: the images of its conversation that a token reads.
      tokens_per_image: vision tokens of each.
      slots: for each slot of the group's feature pool, the slots of the whole image that it belongs to.
    """

    reads: Literal["last", "all"]
    tokens_per_image: int
    slots: dict[int, np.ndarray]

    def remember(self, slots: np.ndarray) -> None:
        """Take the slots of a picture, which may be several images, as a video's frames are."""
        for first in range(0, len(slots), self.tokens_per_image):
            image = slots[first : first + self.tokens_per_image]
            self.slots.update(dict.fromkeys(image.tolist(), image))


def whole_pages(chunk: Chunk, page_size: int) -> int:
    """Return how many tokens a chunk takes in a prefill: it ends with a whole page."""
    return -(-len(chunk.tokens) // page_size) * page_size


def pack_chunks(
    groups: Sequence[Sequence[Chunk]], shapes: Shapes, memories: Sequence[ImageMemory | None]
) -> tuple[Chunks, list[list[int]]]:
    """Return chunks, those of each group side by side, and the index of the last token of each."""
    T = shapes.page_size
    longest = max(sum(whole_pages(chunk, T) for chunk in chunks) for chunks in groups)
    past = max(sum(chunk.start // T for chunk in chunks) for chunks in groups)
    M = smallest(shapes.past, past)
    C = smallest(shapes.prefill_tokens_with_past if M else shapes.prefill_tokens, longest)
    if longest > C or past > M:
        raise RuntimeError(f"chunks of {longest} tokens after {past} pages, for programs of {C} and {M}")
    images = max(sum(int((c.feature_index >= 0).sum()) for c in chunks) for chunks in groups)
    beside = memories[0] is not None
    F = smallest(shapes.prefill_features, images * memories[0].tokens_per_image) if beside else C
    chosen = no_chunks(shapes, C, M, F)
    last: list[list[int]] = []
    for d, chunks in enumerate(groups):
        offset = m = image = 0
        last.append([])
        for number, chunk in enumerate(chunks, 1):
            length, first = len(chunk.tokens), chunk.start // T
            span = slice(offset, offset + length)
            chosen.tokens[d, span] = chunk.tokens
            chosen.segment_ids[d, span] = number
            chosen.positions[d, span] = chunk.positions
            taken = -(-length // T)
            chosen.pages[d, offset // T : offset // T + taken] = chunk.table[first : first + taken]
            chosen.past_pages[d, m : m + first] = chunk.table[:first]
            chosen.past_segments[d, m * T : (m + first) * T] = number
            fed = chunk.feature_index >= 0
            if beside:
                image = _beside(chosen, d, span.start, chunk, memories[d], image, shapes)
            else:
                index = np.arange(offset, offset + length)
                chosen.vision_index[d, span] = np.where(fed, index, -1)
                chosen.features[d, span] = np.where(fed, chunk.feature_index, 0)
            last[-1].append(offset + length - 1)
            offset, m = offset + taken * T, m + first
    return chosen, last


def no_chunks(s: Shapes, C: int, M: int, F: int) -> Chunks:
    """Return the arrays of a prefill of padding: C tokens after M pages, with F vision tokens."""
    D = s.groups
    return Chunks(
        tokens=np.zeros((D, C), np.int32),
        segment_ids=np.zeros((D, C), np.int32),
        positions=np.zeros((D, C, 3), np.int32),
        vision_index=np.full((D, C), -1, np.int32),
        features=np.zeros((D, F), np.int32),
        feature_images=np.zeros((D, F), np.int32),
        pages=np.zeros((D, C // s.page_size), np.int32),
        past_pages=np.zeros((D, M), np.int32),
        past_segments=np.zeros((D, M * s.page_size), np.int32),
        memory_index=np.full((D, s.slots if s.prefill_features else 0, s.vision_memory), -1, np.int32),
    )


def _beside(chosen: Chunks, d: int, offset: int, chunk: Chunk, memory: ImageMemory, image: int, shapes: Shapes) -> int:
    """Put the images of a chunk among the vision tokens of its row. Returns the number of images so far."""
    per, first = memory.tokens_per_image, image
    for at in np.flatnonzero(chunk.feature_index >= 0):
        begin = image * per
        chosen.features[d, begin : begin + per] = memory.slots[int(chunk.feature_index[at])]
        chosen.feature_images[d, begin : begin + per] = image + 1
        chosen.vision_index[d, offset + at] = begin
        image += 1
    if memory.reads == "last":
        first = max(first, image - 1)
    read = np.arange(first * per, image * per)
    for row in chunk.samples:
        chosen.memory_index[d, row.slot] = -2
        chosen.memory_index[d, row.slot, : len(read)] = read
    return image


def decode_rows(
    plans: Mapping[int, Decode],
    shapes: Shapes,
    adapters: Mapping[int, Sequence[int]],
    samplings: Int[np.ndarray, "_ columns"],
) -> tuple[DecodeRows, int]:
    """Return the rows of a plan, and how many each group has.

    Args:
      adapters: numbers of the adapters of each plan's rows.
      samplings: packed `SamplingArrays` of all slots, and of padding.
    """
    per_group = smallest(shapes.decode_rows, max(len(plan.rows) for plan in plans.values()))
    T = shapes.page_size
    used = max(int((plan.starts + np.maximum(plan.steps, 1 + plan.drafted)).max()) for plan in plans.values())
    W, total = smallest(shapes.tables, -(-used // T)), per_group * shapes.groups
    rows = np.zeros((total, programs.TABLE + W), np.int32)
    rows[:, : sampling.COLUMNS] = samplings[-1]
    for group, plan in plans.items():
        span = slice(group * per_group, group * per_group + len(plan.rows))
        rows[span, : sampling.COLUMNS] = samplings[plan.slots + group * shapes.slots]
        rows[span, sampling.STEP] = plan.draws
        rows[span, programs.TOKEN] = plan.tokens[:, 0]
        rows[span, programs.START] = plan.starts
        rows[span, programs.POSITION] = plan.positions
        rows[span, programs.STEPS] = plan.steps + plan.drafted
        rows[span, programs.ADAPTER] = adapters[group]
        width = min(W, plan.tables.shape[1])
        rows[span, programs.TABLE : programs.TABLE + width] = plan.tables[:, :width]
    return DecodeRows(rows), per_group


def drafted(plans: Mapping[int, Decode], per_group: int, shapes: Shapes, most: int) -> Int[np.ndarray, "B K"] | None:
    """Return the drafted tokens of a plan, int32 [B, most]; None if there are none."""
    if all(plan.tokens.shape[1] == 1 for plan in plans.values()):
        return None
    found = np.zeros((per_group * shapes.groups, most), np.int32)
    for group, plan in plans.items():
        rows = slice(group * per_group, group * per_group + len(plan.rows))
        found[rows, : plan.tokens.shape[1] - 1] = plan.tokens[:, 1:]
    return found


@dataclasses.dataclass(frozen=True)
class PictureArrays:
    """A picture of an example, and where its vision tokens go."""

    example: Example
    media: Media
    destinations: np.ndarray

    @property
    def images(self) -> int:
        """Images that it is: tiles and video frames count."""
        segments = self.example.patch_segment_ids[self.span]
        return int(segments[-1] - segments[0]) + 1

    @property
    def span(self) -> slice:
        """Its patches."""
        return slice(self.media.first_patch, self.media.first_patch + self.media.patches)


def pack_pictures(
    groups: Sequence[Sequence[PictureArrays]], batch: PackedBatch, vision_tokens: int, feature_slots: int
) -> tuple[PackedBatch, Int[np.ndarray, "..."]]:
    """Return a batch with the patches of pictures and no text, and the slot of each vision token.

    Args:
      batch: of `empty_pictures`, which is filled.
    """
    destinations = np.full((len(groups), vision_tokens), feature_slots, np.int32)
    for d, pictures in enumerate(groups):
        p = images = windows = f = 0
        for picture in pictures:
            example, span = picture.example, picture.span
            to = slice(p, p + picture.media.patches)
            segments, window = example.patch_segment_ids[span], example.patch_window_ids[span]
            batch.patches[d, to] = example.patches[span]
            batch.patch_positions[d, to] = example.patch_positions[span]
            batch.patch_segment_ids[d, to] = segments - segments[0] + 1 + images
            batch.patch_window_ids[d, to] = window - window[0] + 1 + windows
            destinations[d, f : f + picture.media.tokens] = picture.destinations
            images, windows = int(batch.patch_segment_ids[d, to.stop - 1]), int(batch.patch_window_ids[d, to.stop - 1])
            p, f = to.stop, f + picture.media.tokens
    return batch, destinations


def empty_pictures(groups: int, patches: int, tokens: int, values: int, positions: int) -> PackedBatch:
    """Return a batch without pictures; each patch has so many values and numbers that say where it is."""
    D, P = groups, patches
    return PackedBatch(
        tokens=np.zeros((D, tokens), np.int32),
        segment_ids=np.zeros((D, tokens), np.int32),
        positions=np.zeros((D, tokens, 3), np.int32),
        loss_weights=np.zeros((D, tokens), np.float32),
        patches=np.zeros((D, P, values), np.uint8),
        patch_segment_ids=np.zeros((D, P), np.int32),
        patch_window_ids=np.zeros((D, P), np.int32),
        patch_positions=np.zeros((D, P, positions), np.int32),
        vision_index=np.full((D, tokens), -1, np.int32),
    )
