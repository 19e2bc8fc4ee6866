"""Images of an example read into the example, whatever form it names them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvlm.data.content import media_sources
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import IMAGE_KEYS, parse_example
from jvlm.data.images import image_source, unwrap

_LISTS = ("images", "image", "videos", "video", "rejected_images", "rejected_videos")
_TURNS = ("messages", "rejected_messages")
_DOCUMENT = "document"


def embed(example: dict[str, Any], origin: Origin, roots: Sequence[str]) -> dict[str, Any]:
    """Return the example with its images and frames as bytes; everything else as it was.

    A path becomes {"bytes", "path"}; an object with the path or URL of a file gains "bytes". What holds its image
    already, as bytes, base64 or a ``data:`` URI, stays.

    Args:
      roots: folders in which relative paths are looked up, in order.

    Raises:
      ExampleError: an example that cannot be used; an image that is not there, empty, or on the network.
    """
    parse_example(example, origin)
    media = {key: _media(example[key], origin, key, roots) for key in _LISTS if key in example}
    turns = {key: _turns(example[key], origin, key, roots) for key in _TURNS if isinstance(example.get(key), list)}
    pieces = {}
    if isinstance(example.get(_DOCUMENT), list):
        pieces[_DOCUMENT] = [_block(block, origin, _DOCUMENT, roots) for block in example[_DOCUMENT]]
    whole = {**example, **media, **turns, **pieces}
    conversation = parse_example(whole, origin)
    for source in (source for part in conversation.media for source in media_sources(part)):
        file = _file(source, origin, "messages", roots)
        if file is not None:
            raise ExampleError(
                origin, "messages", f"{file} is named in a form that is not embedded", "Name it in 'images'"
            )
    return whole


def _turns(messages: list, origin: Origin, field: str, roots: Sequence[str]) -> list:
    return [
        {**message, "content": [_block(block, origin, f"{field}[{i}].content", roots) for block in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for i, message in enumerate(messages)
    ]


def _block(block: Any, origin: Origin, field: str, roots: Sequence[str]) -> Any:
    if not isinstance(block, dict):
        return block
    return {
        **block,
        **{key: _media(block[key], origin, field, roots) for key in (*IMAGE_KEYS, "video") if key in block},
    }


def _media(source: Any, origin: Origin, field: str, roots: Sequence[str]) -> Any:
    if isinstance(source, list):
        return [_media(item, origin, f"{field}[{i}]", roots) for i, item in enumerate(source)]
    if isinstance(source, dict) and source.get("video") is not None:  # with settings of its sampling
        return {**source, "video": _media(source["video"], origin, f"{field}.video", roots)}
    file = _file(source, origin, field, roots)
    if file is None:
        return source
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ExampleError(
            origin, field, f"{file} cannot be read ({error.strerror})", "Check its permissions"
        ) from error
    if not content:
        raise ExampleError(origin, field, f"{file} is empty, 0 bytes", "Replace or remove the image")
    return {**source, "bytes": content} if isinstance(source, dict) else {"bytes": content, "path": source}


def _file(source: Any, origin: Origin, field: str, roots: Sequence[str]) -> Path | None:
    """Return the file that an image is in; None for one inside the example. Raises ExampleError if it is not there."""
    held = unwrap(source)
    if not isinstance(held, str):
        return None
    image = image_source(held, tuple(roots), origin, field)
    return image if isinstance(image, Path) else None
