"""The Cauldron (Idefics2) and FineVision: images, and questions with answers about them."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats import turns
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import Fields, image_block, listed, need_list, text, text_block
from jvlm.data.values import is_null, shown


def _matches(record: dict[str, Any]) -> bool:
    texts = listed(record.get("texts"))
    return bool(texts) and isinstance(texts[0], dict) and "user" in texts[0]


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    given = need_list(fields.need("texts")[1], origin, "texts")
    blocks = [image_block(image) for image in fields.take_images()]
    messages, sources = fields.take_system(), []
    for index, turn in enumerate(given):
        field = f"texts[{index}]"
        if not isinstance(turn, dict):
            raise ExampleError(origin, field, f"{shown(turn)} is not an object", "Give user and assistant")
        for name, role in (("user", "user"), ("assistant", "assistant")):
            if is_null(turn.get(name)):
                raise ExampleError(origin, f"{field}.{name}", "missing", "Give user and assistant")
            words = text_block(text(turn[name], origin, f"{field}.{name}"))
            messages.append({"role": role, "content": [*blocks, words]})
            blocks = []
        if isinstance(turn.get("source"), str):
            sources.append(turn["source"])
    # the set that a record came from names its curve
    channel = {"channel": sources[0]} if sources and "channel" not in fields.rest() else {}
    unused = turns.unused(given, ("user", "assistant", "source"), "texts")
    return {**fields.rest(), **channel, **unused, "messages": messages}


CAULDRON = Format("cauldron", "texts, a list of objects with user and assistant", _matches, _convert)
