"""SmolVLM2's turns: Idefics3's, behind a token that begins the text."""

from __future__ import annotations

import dataclasses

from jvlm.families.idefics3 import chat_format

CHAT_FORMAT = dataclasses.replace(chat_format.CHAT_FORMAT, template="<|im_start|>" + chat_format.TEMPLATE)
