"""What of an example has a loss, where it does not say so itself."""

from __future__ import annotations

import dataclasses

from jvlm.data.choices import LossChoice
from jvlm.data.content import Conversation, Document, Parsed
from jvlm.data.errors import ExampleError


def with_loss_on(example: Parsed, choice: LossChoice | None) -> Parsed:
    """Return the example with the loss weights of a choice: ms-swift's default, last_round and all.

    "answers" leaves every assistant turn its weight, "last_answer" only the last one; "all" gives a weight of 1 to all
    other text too. None is "answers" of a conversation, "all" of a document. What the example says itself comes first,
    and what a turn says (``loss``, ``loss_scale``) stays.

    Raises:
      ExampleError: a choice of answers for a document.
    """
    choice = example.loss or choice
    if isinstance(example, Document):
        if choice in (None, "all"):
            return example
        fix = "Leave loss out for documents, or set it to all; data.loss is for all of the data"
        raise ExampleError(example.origin, "loss", f"{choice!r} of a document, which has no answers", fix)
    return _on_turns(example, choice or "answers")


def _on_turns(conversation: Conversation, choice: LossChoice) -> Conversation:
    if choice == "all":
        return dataclasses.replace(conversation, prompt_weight=1.0)
    if choice == "answers":
        return conversation
    answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    earlier = set(answers[:-1])
    messages = tuple(
        dataclasses.replace(message, loss_weight=0.0) if index in earlier and not message.loss_given else message
        for index, message in enumerate(conversation.messages)
    )
    return dataclasses.replace(conversation, messages=messages)
