"""Captions: one image and a text."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import QUERY, Fields, image_block, images_of, text_block
from jvlm.data.formats.messages import chat
from jvlm.data.values import is_null

_CAPTION = ("caption", "text", "txt")
_OTHERS = (*QUERY, "response", "answer", "answers", "messages", "conversations", "conversation", "texts")


def _matches(record: dict[str, Any]) -> bool:
    has_caption = any(not is_null(record.get(name)) for name in _CAPTION)
    has_other = any(not is_null(record.get(name)) for name in _OTHERS)
    return len(images_of(record)) == 1 and has_caption and not has_other


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    caption, images = fields.need_text(*_CAPTION), fields.take_images()
    if len(images) != 1:
        raise ExampleError(origin, "images", f"{len(images)} images for one caption", "Give one image")
    image = image_block(images[0])
    if options.caption_prompt is None:
        return {**fields.rest(), "document": [image, text_block(caption)]}
    return {**fields.rest(), "messages": chat([image, text_block(options.caption_prompt)], caption)}


CAPTION = Format("caption", "one image, and caption, text or txt, without a question", _matches, _convert)
