"""How each family's chat templates are used, and the templates for tokenizers that bring none."""

from __future__ import annotations

import dataclasses

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
