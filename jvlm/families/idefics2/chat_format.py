"""Idefics2's turns."""

from __future__ import annotations

from jvlm.data.chat_format import ChatFormat

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] }}"
    "{% elif content['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

CHAT_FORMAT = ChatFormat(
    TEMPLATE,
    image="<image>",
    always_blocks=True,
    special_tokens=True,
    # as transformers 5, whose tokenizers no longer begin a word by themselves after a special token
    space_after_image=True,
    stops=("<end_of_utterance>",),
)
