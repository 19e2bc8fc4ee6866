"""Groups of sampled answers as packed sequences: the answers to one prompt share its pictures.

Axes: B sequences, S tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jvlm.data import packing
from jvlm.data.packing import Example
from jvlm.data.segments import joined_segments
from jvlm.rl.log_probs import Draws
from jvlm.rl.task import AnswerSequences, PolicyBatch, empty_batch


class SampledAnswer(NamedTuple):
    """An answer to be trained on.

    Attributes:
      tokens: with the one that ended it.
      log_probs: in the engine.
      advantage, weight: of each token.
      old: log-probabilities before the first update; None takes those of the engine.
      seed, number: of the draw.
    """

    tokens: Sequence[int]
    log_probs: Sequence[float]
    advantage: float
    weight: float
    old: Sequence[float] | None = None
    seed: int = 0
    number: int = 0


class Place(NamedTuple):
    """Where an answer stands in a micro-batch: values of its tokens are at ``[row, span]``."""

    answer: SampledAnswer
    row: int
    span: slice


class SampledGroup(NamedTuple):
    """A prompt with its answers."""

    prompt: Example
    answers: Sequence[SampledAnswer]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch.

    Attributes:
      sequences: in it.
      seq_len, max_patches: of a sequence.
      max_length, max_image_patches: longest conversation and largest image, as of `packing.assemble`.
      patch_values, position_values: likewise.
    """

    sequences: int
    seq_len: int
    max_patches: int
    max_length: int | None
    max_image_patches: int | None
    patch_values: int
    position_values: int


def with_answer(prompt: Example, tokens: Sequence[int]) -> Example:
    """Return a prompt with an answer behind it, whose tokens have a loss weight of 1."""
    count = len(tokens)
    first = int(prompt.positions.max(initial=-1)) + 1
    positions = np.repeat(np.arange(first, first + count, dtype=prompt.positions.dtype)[:, None], 3, 1)

    def joined(name: str, rest: np.ndarray) -> np.ndarray:
        own = getattr(prompt, name)
        return np.concatenate([own, rest.astype(own.dtype)])

    return dataclasses.replace(
        prompt,
        tokens=joined("tokens", np.asarray(tokens)),
        positions=joined("positions", positions),
        loss_weights=np.concatenate([np.zeros(prompt.length, np.float32), np.ones(count, np.float32)]),
        turns=joined("turns", np.full(count, int(prompt.turns.max(initial=0)) + 1)),
        vision_index=joined("vision_index", np.full(count, -1)),
        media=joined("media", np.zeros(count)),
        breaks=None,
    )


class _Part(NamedTuple):
    """Answers of a group that stand in one sequence."""

    example: Example
    prompt_length: int
    answers: Sequence[SampledAnswer]


def _parts(group: SampledGroup, seq_len: int) -> list[_Part]:
    """Return the answers of a group as few examples, each of which fits a sequence and has the pictures once."""
    parts: list[list[SampledAnswer]] = []
    left = 0
    for answer in group.answers:
        length = group.prompt.length + len(answer.tokens)
        if length > left:
            parts.append([])
            left = seq_len
        parts[-1].append(answer)
        left -= length
    found = []
    for answers in parts:
        examples = [with_answer(group.prompt, answer.tokens) for answer in answers]
        shares = [number > 0 for number in range(len(answers))]
        joined = joined_segments(examples, shares, [{}] * len(answers))
        found.append(_Part(joined, group.prompt.length, answers))
    return found


def packed_answers(
    groups: Sequence[SampledGroup], shape: Shape, banned: Int[np.ndarray, "2 K"]
) -> list[AnswerSequences]:
    """Return the micro-batches of a step; how many depends on the answers, in steps of `packing.bucket`.

    Args:
      banned: of `banned_ids`.
    """
    parts = [part for group in groups for part in _parts(group, shape.seq_len)]
    rows = [
        [parts[i] for i in row]
        for row in packing.best_fit([part.example for part in parts], shape.seq_len, shape.max_patches)
    ]
    count = packing.bucket(-(-len(rows) // shape.sequences), 1)
    rows += [[] for _ in range(count * shape.sequences - len(rows))]
    batches = [
        _batch(rows[start : start + shape.sequences], shape, banned) for start in range(0, len(rows), shape.sequences)
    ]
    batches[0].policy.share[0] = 1.0
    return batches


def _batch(rows: Sequence[Sequence[_Part]], shape: Shape, banned: Int[np.ndarray, "2 K"]) -> AnswerSequences:
    sequences = [[part.example for part in row] for row in rows]
    packed = packing.assemble(
        sequences,
        shape.seq_len,
        shape.max_patches,
        patch_values=shape.patch_values,
        position_values=shape.position_values,
        max_segment_length=shape.max_length,
        max_image_patches=shape.max_image_patches,
        array=lambda size: np.zeros(size, np.uint8),  # kept until the step: not an array that is used again
    )
    policy, places = empty_batch(packed), []
    for b, row in enumerate(rows):
        start = 0
        for part in row:
            for answer in part.answers:
                first = start + part.prompt_length - 1
                span = slice(first, first + len(answer.tokens))
                policy.advantages[b, span] = answer.advantage
                policy.weights[b, span] = answer.weight
                policy.rollout[b, span] = answer.log_probs
                policy.old[b, span] = answer.log_probs if answer.old is None else answer.old
                policy.is_first[b, first] = True
                places.append(Place(answer, b, span))
                start = span.stop + 1
    policy.banned[:] = banned
    known = packing.packed_sequences(packed, sequences, (), ())
    return AnswerSequences(**_fields(known), policy=policy, places=tuple(places))


def draws_of(batch: AnswerSequences) -> Draws:
    """Return what the tokens of a micro-batch were drawn with."""
    shape = batch.policy.weights.shape
    draws = Draws(np.zeros(shape, np.uint32), np.zeros(shape, np.int32), np.zeros(shape, np.int32))
    for answer, row, span in batch.places:
        draws.seeds[row, span], draws.numbers[row, span] = answer.seed, answer.number
        draws.steps[row, span] = np.arange(len(answer.tokens))
    return draws


def _fields(packed: packing.PackedSequences) -> dict:
    return {field.name: getattr(packed, field.name) for field in dataclasses.fields(packing.PackedSequences)}


__all__ = ["PolicyBatch", "SampledAnswer", "SampledGroup", "Shape", "packed_answers", "with_answer"]
