"""How a family's chat templates are used."""

from __future__ import annotations

import dataclasses

from jvlm.data.box_formats import FormatName


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How a family's chat templates are used.

    Attributes:
      template: for tokenizers that bring none.
      image: placeholder of an image, as templates write it.
      video: placeholder of a video; None gives a video as a list of images.
      media_prefix, media_suffix: what stands before and behind a placeholder, as templates write it.
      always_blocks: the template takes content as a list of blocks only, never as a string.
      inline: the template takes strings only: placeholders are written among the words.
      special_tokens: the tokenizer adds its own (a beginning of text) to what the template writes.
      space_after_image: a space is put between an image and a word that follows at once.
      stops: tokens that end a turn, beside the end of text.
      box_format: how the family's models were taught to write boxes and points.
    """

    template: str
    image: str
    video: str | None = None
    media_prefix: str = ""
    media_suffix: str = ""
    always_blocks: bool = False
    inline: bool = False
    special_tokens: bool = False
    space_after_image: bool = False
    stops: tuple[str, ...] = ()
    box_format: FormatName = "json"
