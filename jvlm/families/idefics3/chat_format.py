"""Idefics3's turns."""

from __future__ import annotations

from jvlm.data.chat_format import ChatFormat

# For tokenizers that bring none; those of the released models begin with their own token for a text's begin.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

CHAT_FORMAT = ChatFormat(TEMPLATE, image="<image>", always_blocks=True, stops=("<end_of_utterance>",))
