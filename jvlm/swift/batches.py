"""Sizes of packed batches that hold as many conversations, on average, as a batch size of ms-swift asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jvlm.data import survey
from jvlm.data.config import DataConfig
from jvlm.data.processor import Processor
from jvlm.data.survey import Size

# A sequence grows up to so many tokens to hold a batch; beyond, a batch has several sequences.
_LONGEST = 8192
_STEP = 64
_FILLED = 0.95  # share of a sequence that packing fills


@dataclasses.dataclass(frozen=True)
class Batches:
    """How a step is made up.

    Attributes:
      data: with batch_size, seq_len and max_patches.
      accumulation: batches of a step.
      conversations: of a step, on average.
    """

    data: DataConfig
    accumulation: int
    conversations: float


def choose(
    sizes: Sequence[Size],
    data: DataConfig,
    processor: Processor,
    *,
    per_device: int,
    accumulation: int | None,
    devices: int,
) -> Batches:
    """Return batches of about ``per_device`` conversations on each device.

    Where a sequence that holds the longest conversation holds more of them than asked for, fewer batches make a step:
    the conversations of a step stay as many.

    Args:
      sizes: of a sample of the data.
      data: ``seq_len`` is "auto" or what the user asks for.
      accumulation: batches of a step as asked for; None is as many as hold 16 conversations, ms-swift's default.
    """
    accumulation = accumulation or math.ceil(16 / (per_device * devices))
    fitting = [size for size in sizes if size.length <= (data.max_length or size.length)]
    mean = sum(size.length for size in fitting) / max(len(fitting), 1)
    longest = max((size.length for size in fitting), default=_STEP)
    wanted = per_device * mean / _FILLED
    tokens = data.seq_len
    if tokens == "auto":
        tokens = math.ceil(max(longest, min(wanted, max(_LONGEST, longest))) / _STEP) * _STEP
    sequences = max(1, round(wanted / tokens))
    batches = max(1, round(accumulation * wanted / (sequences * tokens)))
    data = dataclasses.replace(data, seq_len=tokens, batch_size=sequences * devices)
    data = survey.choose_sizes(list(sizes), data, processor)
    conversations = batches * sequences * devices * tokens * _FILLED / max(mean, 1)
    return Batches(data, batches, conversations)
