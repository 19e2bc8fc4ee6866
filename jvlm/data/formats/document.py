"""Documents: text with images in it, trained on as it stands, without a chat template (MM1, Idefics2)."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import QUERY, RESPONSE, Fields, image_block, images_of, listed, text, text_block
from jvlm.data.values import is_null, shown

_TAG = "<image>"
_OTHERS = (*QUERY, *(name for name in RESPONSE if name != "text"), "caption", "txt", "conversations", "conversation")


def _matches(record: dict[str, Any]) -> bool:
    if not is_null(record.get("document")):
        return True
    texts, images = listed(record.get("texts")), listed(record.get("images"))
    if texts is not None and images is not None:  # OBELICS: a list of each, null where the other has something
        return len(texts) == len(images) and bool(texts) and all(t is None or isinstance(t, str) for t in texts)
    words = record.get("text")
    if not isinstance(words, str) or any(not is_null(record.get(name)) for name in (*_OTHERS, "messages")):
        return False
    return not images_of(record) or _TAG in words


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    if fields.first("document"):
        return record
    if fields.first("texts"):
        blocks = _interleaved(fields.take("texts"), fields.take("images"), origin)
    else:
        blocks = _tagged(fields.need_text("text"), fields.take_images(), origin)
    return {**fields.rest(), "document": blocks}


def _interleaved(texts: Any, images: Any, origin: Origin) -> list[dict[str, Any]]:
    texts, images = listed(texts) or [], listed(images) or []
    if len(texts) != len(images) or not texts:
        problem = f"{len(texts)} texts beside {len(images)} images"
        raise ExampleError(origin, "texts", problem, "Give lists of one length, null where the other has an entry")
    blocks = []
    for index, (words, image) in enumerate(zip(texts, images, strict=True)):
        if not is_null(image) and not is_null(words):
            problem = f"both a text and an image at index {index}"
            raise ExampleError(origin, f"texts[{index}]", problem, "Give each an index of its own")
        if not is_null(image):
            blocks.append(image_block(image))
        elif not is_null(words):
            if not isinstance(words, str):
                raise ExampleError(origin, f"texts[{index}]", f"{shown(words)} is not text", "Give a string or null")
            blocks.append(text_block(text(words, origin, f"texts[{index}]")))
    return blocks


def _tagged(words: str, images: list[Any], origin: Origin) -> list[dict[str, Any]]:
    """Text whose tags stand for the images, in order; without any images a tag is a word."""
    if not images:
        return [text_block(words)]
    pieces = words.split(_TAG)
    if len(pieces) - 1 != len(images):
        problem = f"{len(pieces) - 1} {_TAG} tags but {len(images)} entries"
        raise ExampleError(origin, "images", problem, "Give one entry for each tag")
    blocks = [text_block(pieces[0])]
    for image, piece in zip(images, pieces[1:], strict=True):
        blocks += [image_block(image), text_block(piece)]
    return [block for block in blocks if block.get("text") != ""]


DOCUMENT = Format(
    "document", "document, or text alone or with <image> tags, or texts beside images of one length", _matches, _convert
)
