"""Conversations to token ids through the checkpoint's own chat template, with the weight of every token's loss."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from jvlm.data.errors import Origin, RowError
from jvlm.data.rows import Message, split_media

_MARK = re.compile("\ue000(\\d+)\ue001")

# ChatML as Qwen2.5-VL ships it: used when a tokenizer folder brings no template of its own.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IDEFICS2_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] }}"
    "{% elif content['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class ChatStyle:
    """How a family's templates are used.

    Attributes:
      template: for tokenizers that bring none.
      image, video: placeholders that templates write; without one for videos, they are given as images.
      always_blocks: the template takes content as a list of blocks only, never as a string.
      inline: the template takes strings only: placeholders are written among the words.
      special_tokens: the tokenizer adds its own (a beginning of text) to what the template writes.
      stops: tokens that end a turn, beside the end of text.
      space_after_image: a space is put between an image and a word that follows at once.
    """

    template: str
    image: str
    video: str | None = None
    always_blocks: bool = False
    inline: bool = False
    special_tokens: bool = False
    space_after_image: bool = False
    stops: tuple[str, ...] = ()


COMPOSED = "composed"
# By `VLMConfig.architecture`.
STYLES: dict[str, ChatStyle] = {
    "qwen2_5_vl": ChatStyle(QWEN_TEMPLATE, "<|image_pad|>", "<|video_pad|>"),
    # MM1.5 publishes neither template nor tokenizer.
    "mm1_5": ChatStyle(QWEN_TEMPLATE, "<|image_pad|>", "<|video_pad|>"),
    # The template is the language model's, which knows no images.
    COMPOSED: ChatStyle(QWEN_TEMPLATE, "<|image_pad|>", inline=True),
    # The space: as transformers 5, whose tokenizers no longer begin a word by themselves after a special token.
    "idefics2": ChatStyle(
        IDEFICS2_TEMPLATE,
        "<image>",
        always_blocks=True,
        special_tokens=True,
        space_after_image=True,
        stops=("<end_of_utterance>",),
    ),
}


def style_of(architecture: str) -> ChatStyle:
    """The style of an architecture. Raises KeyError naming the known ones."""
    if architecture not in STYLES:
        raise KeyError(f"no chat style for {architecture!r}; known: {', '.join(STYLES)}")
    return STYLES[architecture]


class ChatTemplate:
    """Renders messages and tokenizes them.

    The template is rendered twice, once with markers in place of the assistant's words: that tells which characters
    are learnt, for any template, without parsing it.
    """

    def __init__(self, tokenizer: Any, style: ChatStyle):
        self.tokenizer, self.style = tokenizer, style
        if not tokenizer.chat_template:
            tokenizer.chat_template = style.template
        special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(special)))) if special else re.compile("(?!)")

    def render(self, messages: tuple[Message, ...], *, generation_prompt: bool) -> str:
        """The prompt as text, one media placeholder per tag."""
        blocks = [{"role": m.role, "content": self._content(m.content)} for m in messages]
        return self._apply(blocks, generation_prompt)

    def tokenize(
        self, messages: tuple[Message, ...], *, generation_prompt: bool, origin: Origin
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int32 [n], loss weights float32 [n], turn int32 [n]) before media placeholders are expanded.

        An assistant turn is learnt up to and including its end-of-turn token. ``turn`` is the number of the last
        turn whose learnt part has begun, counting assistant turns from 1. In a prompt nothing is learnt: both are 0
        with ``generation_prompt``, and templates may then shorten earlier turns (drop their thinking, say).
        """
        text, spans = self._spans(messages, generation_prompt, origin)
        encoded = self.tokenizer(text, add_special_tokens=self.style.special_tokens, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        # a token that begins with the space before an answer is part of it
        starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        weights, turn = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
        for number, (begin, end, weight) in enumerate(spans, 1):
            weights[(ends > begin) & (starts < end)] = weight
            turn[ends > begin] = number
        return ids, weights, turn

    def _spans(self, messages, generation_prompt, origin) -> tuple[str, list[tuple[int, int, float]]]:
        text = self.render(messages, generation_prompt=generation_prompt)
        learnt = [m for m in messages if m.role == "assistant"]
        if generation_prompt or not learnt:
            return text, []
        marked = [
            {"role": m.role, "content": self._content(f"\ue000{i}\ue001" if m.role == "assistant" else m.content)}
            for i, m in enumerate(messages)
        ]
        pieces = _MARK.split(self._apply(marked, generation_prompt))
        rebuilt, spans, at = [pieces[0]], [], len(pieces[0])
        for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
            message = messages[int(number)]
            words = message.content
            closing = self._special.match(after)
            end = at + len(words) + (closing.end() if closing else 0)
            spans.append((at, end, message.loss_weight))
            rebuilt += [words, after]
            at += len(words) + len(after)
        if "".join(rebuilt) != text or len(spans) != len(learnt):
            raise RowError(
                origin,
                "messages",
                "the chat template changes the words of an assistant turn, so what to learn cannot be told apart",
                "Write the turn as the template renders it: trimmed, and without media tags",
            )
        return text, spans

    def _apply(self, blocks: list[dict], generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(blocks, tokenize=False, add_generation_prompt=generation_prompt)
        if self.style.space_after_image:
            text = re.sub(rf"{re.escape(self.style.image)}(?=[^\s<])", f"{self.style.image} ", text)
        return text

    def _content(self, content: str) -> str | list[dict[str, str]]:
        blocks = split_media(content)
        if self.style.video is None:
            blocks = [{"type": "image"} if b["type"] == "video" else b for b in blocks]
        if self.style.inline:
            return "".join(self.style.image if b["type"] == "image" else b["text"] for b in blocks)
        if self.style.always_blocks:
            return blocks or [{"type": "text", "text": ""}]
        return blocks if any(b["type"] != "text" for b in blocks) else content
