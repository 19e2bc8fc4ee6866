"""Documents put one after the other into one segment, in which tokens see those of earlier documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jvlm.data.cutting import Limits
from jvlm.data.packing import Example
from jvlm.data.unread_patches import joined_patches


def joined(examples: Sequence[Example], most: int, limits: Limits) -> list[Example]:
    """Return examples in which up to ``most`` documents of one source that follow one another are one, if they fit.

    Conversations, and parts of documents that were cut, stay as they are, where they are.
    """
    if most == 1:
        return list(examples)
    groups: list[list[Example]] = []
    open_groups: dict[int, list[Example]] = {}  # by source
    for example in examples:
        if not example.is_document or example.made_to_fit == "cut":
            groups.append([example])
            continue
        group = open_groups.get(example.source, [])
        if not group or len(group) == most or not _fits([*group, example], limits):
            group = open_groups[example.source] = []
            groups.append(group)
        group.append(example)
    return [concatenated(group) for group in groups]


def _fits(group: Sequence[Example], limits: Limits) -> bool:
    tokens, patches = sum(one.length for one in group), sum(one.num_patches for one in group)
    return tokens <= limits.tokens and patches <= limits.patches


def concatenated(examples: Sequence[Example]) -> Example:
    """Return examples as one, in one segment; it has the origin of the first."""
    first, *rest = examples
    if not rest:
        return first
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in _OFFSETS}
    offsets = dict.fromkeys(_OFFSETS, 0)
    for one in examples:
        for name, values in arrays.items():
            array = getattr(one, name)
            # -1 stands for text in vision_index, 0 for text in media
            inside = array >= (1 if name == "media" else 0)
            values.append(np.where(inside, array + offsets[name], array).astype(array.dtype))
        offsets["positions"] += int(one.positions.max()) + 1
        offsets["vision_index"] += len(one.vision_segment_ids)
        offsets["media"] += len(one.sizes)
        segments, windows = (int(ids[-1]) if len(ids) else 0 for ids in (one.patch_segment_ids, one.patch_window_ids))
        offsets["vision_segment_ids"] += segments
        offsets["patch_segment_ids"] += segments
        offsets["patch_window_ids"] += windows
    plain = "tokens loss_weights turns patch_positions".split()
    return dataclasses.replace(
        first,
        **{name: np.concatenate(values) for name, values in arrays.items()},
        **{name: np.concatenate([getattr(one, name) for one in examples]) for name in plain},
        patches=joined_patches([one.patches for one in examples], first.patches.shape[1]),
        sizes=tuple(size for one in examples for size in one.sizes),
        records=sum(one.records for one in examples),
    )


_OFFSETS = "positions vision_index media vision_segment_ids patch_segment_ids patch_window_ids".split()
