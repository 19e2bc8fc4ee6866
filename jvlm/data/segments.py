"""Several conversations as the segments of one example: answers to one prompt, say, which share its media."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jvlm.data.packing import Example
from jvlm.data.unread_patches import joined_patches

_BY_TOKEN = ("tokens", "positions", "loss_weights")
_BY_PATCH = ("patches", "patch_positions")


def joined_segments(
    examples: Sequence[Example], shares: Sequence[bool], values: Sequence[Mapping[str, float]]
) -> Example:
    """Return one example of which each given one is a segment, in order.

    Segments do not see one another. They stay in one packed sequence, so that vision tokens may feed several of them.

    Args:
      examples: of one segment each.
      shares: whether an example has the media of the first one, so that its own patches are left out.
      values: numbers that the task wants to know of each segment.
    """
    first = examples[0]
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in (*_BY_TOKEN, "turns", "vision_index", "media")}
    patches: dict[str, list[np.ndarray]] = {
        name: [] for name in (*_BY_PATCH, "vision_segment_ids", "patch_segment_ids", "patch_window_ids")
    }
    turns = vision_tokens = images = windows = media = 0
    sizes: list = []
    for example, shared in zip(examples, shares, strict=True):
        for name in _BY_TOKEN:
            arrays[name].append(getattr(example, name))
        arrays["turns"].append(np.where(example.turns > 0, example.turns + turns, example.turns))
        before = (0, 0) if shared else (vision_tokens, media)
        for name, offset, least in (("vision_index", before[0], 0), ("media", before[1], 1)):
            own = getattr(example, name)
            arrays[name].append(np.where(own >= least, own + offset, own))
        turns += int(example.turns.max(initial=0))
        if shared:
            continue
        for name in _BY_PATCH:
            patches[name].append(getattr(example, name))
        patches["vision_segment_ids"].append(example.vision_segment_ids + images)
        patches["patch_segment_ids"].append(example.patch_segment_ids + images)
        patches["patch_window_ids"].append(example.patch_window_ids + windows)
        vision_tokens += len(example.vision_segment_ids)
        images += int(example.patch_segment_ids.max(initial=0))
        windows += int(example.patch_window_ids.max(initial=0))
        media += len(example.sizes)
        sizes += example.sizes
    joined = {name: np.concatenate(parts).astype(getattr(first, name).dtype) for name, parts in arrays.items()}
    own = {name: parts for name, parts in patches.items() if name != "patches"}
    joined |= {name: np.concatenate(parts).astype(getattr(first, name).dtype) for name, parts in own.items()}
    joined["patches"] = joined_patches(patches["patches"], first.patches.shape[1])
    lengths = [example.length for example in examples]
    return dataclasses.replace(
        first,
        **joined,
        sizes=tuple(sizes),
        segments=np.repeat(np.arange(1, len(examples) + 1, dtype=np.int32), lengths),
        values=tuple(dict(one) for one in values),
    )


def segment_of(example: Example, number: int) -> Example:
    """Return one segment of an example, from 1, with all of its patches."""
    if example.segments is None:
        return example
    inside = example.segments == number
    names = (*_BY_TOKEN, "turns", "vision_index", "media")
    own = {name: getattr(example, name)[inside] for name in names}
    return dataclasses.replace(example, **own, segments=None, values=example.values[number - 1 : number])
