"""Images of a conversation made smaller until it fits a packed sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jvlm.data.content import Conversation, Document
from jvlm.data.errors import ExampleError
from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.data.packing import Example
from jvlm.data.processor import Processor


def shrink(
    processor: Processor,
    conversation: Conversation | Document,
    fits: Callable[[Example], bool],
    *,
    decode: bool = True,
    encode: Callable[[ImageProcessorConfig], Example] | None = None,
) -> Example | None:
    """Return the example with its images as large as ``fits`` allows; None where even the smallest do not fit.

    The images are decoded once and encoded anew for each size that is tried; boxes and points follow them.

    Args:
      decode: as of `Processor.encode`.
      encode: makes the example with other settings of its images, where it is more than the conversation.
    """
    settings = processor.image_config_of(conversation)
    if encode is None:
        opened = processor.with_open_media(conversation, images=decode)
        encode = lambda config: processor.encode(opened, image_config=config, decode=decode)  # noqa: E731
    for changes in processor.image_processor.reductions(settings):
        if not changes:
            continue
        best = _encoded(encode, dataclasses.replace(settings, **changes[-1]), fits)
        if best is None:
            continue
        low, high = 0, len(changes) - 1  # the mildest change that fits lies in low..high
        while low < high:
            middle = (low + high) // 2
            example = _encoded(encode, dataclasses.replace(settings, **changes[middle]), fits)
            if example is None:
                low = middle + 1
            else:
                best, high = example, middle
        return best
    return None


def _encoded(
    encode: Callable[[ImageProcessorConfig], Example], config: ImageProcessorConfig, fits: Callable[[Example], bool]
) -> Example | None:
    try:
        example = encode(config)
    except ExampleError:  # as it is, the example can be encoded: a size at which it cannot be is too small for it
        return None
    example = dataclasses.replace(example, made_to_fit="shrunk")
    return example if fits(example) else None
