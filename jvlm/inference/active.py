"""What the engine knows of a request, and of a step that it has started."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.inference.answer import Answer
from jvlm.inference.answer_masks import AnswerMasks
from jvlm.inference.device_state import Sampled
from jvlm.inference.requests import Request, TokenLogprob
from jvlm.inference.scheduling.plans import Plan
from jvlm.inference.scheduling.sequence_spec import SequenceSpec
from jvlm.inference.shapes import Need


@dataclasses.dataclass
class Active:
    """A request in the engine.

    Attributes:
      answers: one for each of its ``n``.
      masks: which tokens may come next in them; None where all may.
      group: whose scheduler has it; -1 while it waits for larger shapes.
    """

    request: Request
    spec: SequenceSpec
    need: Need
    adapter: int
    ends: frozenset[int]
    answers: list[Answer]
    masks: AnswerMasks | None = None
    group: int = -1
    cached: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    reported: bool = False


@dataclasses.dataclass(frozen=True)
class Launched:
    """A plan of each group that was given to the device.

    Attributes:
      sampled: the tokens that they draw.
      done: an array that is there when they are done; None where nothing runs.
      began: when they were given to it.
      compiled: whether a program was compiled for them, so that their time is not that of others.
    """

    plans: Mapping[int, Plan]
    sampled: Sequence[Sampled]
    done: Any
    began: float
    compiled: bool = False
