"""The chat page: one HTML file, put together from its sources, and the headers that it is served with."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping
from typing import NamedTuple

_SCRIPTS = ("dom.js", "markdown.js", "regions.js", "store.js", "client.js", "pictures.js", "messages.js", "chat.js")
_STYLE_PLACE, _SCRIPT_PLACE = "<style></style>", "<script></script>"


class Page(NamedTuple):
    """A page as it is sent."""

    text: str
    headers: Mapping[str, str]


def chat_page() -> Page:
    """Return the chat page. Its policy allows its own script and style by their hashes, and no other place."""
    folder = importlib.resources.files(__package__)
    style = "\n" + (folder / "style.css").read_text(encoding="utf-8")
    scripts = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'\n(() => {{\n"use strict";\n{scripts}}})();\n'
    text = (folder / "index.html").read_text(encoding="utf-8")
    text = text.replace(_STYLE_PLACE, f"<style>{style}</style>").replace(_SCRIPT_PLACE, f"<script>{script}</script>")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
        f"script-src {_source(script)}; style-src {_source(style)}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(
        text,
        {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )


def _source(text: str) -> str:
    """Return how a policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
