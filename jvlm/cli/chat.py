"""``jvlm chat``: a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import Annotated

from jvlm.cli.model import ModelOptions, load, parse_model_command
from jvlm.options import FLAT


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk with a model in the terminal.

    Attributes:
      model: the model that answers, how, and on which devices.
      system: system prompt; None leaves it to the model's chat template.
      adapter: the one of ``adapters`` that answers; None is the base.
    """

    model: Annotated[ModelOptions, FLAT]
    system: str | None = None
    adapter: str | None = None


def run(words: list[str]) -> int:
    options = parse_model_command(Chat, words, "jvlm chat")
    from jvlm.inference.chat import chat

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the chat says what is wrong with a line, and goes on
    model, processor, layout = load(options.model)
    chat(model, processor, options.model.sampling, options.system, layout=layout, adapter=options.adapter)
    return 0
