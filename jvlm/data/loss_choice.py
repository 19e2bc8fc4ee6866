"""What of a conversation has a loss, where the example does not say so itself."""

from __future__ import annotations

import dataclasses

from jvlm.data.choices import LossChoice
from jvlm.data.content import Conversation


def with_loss_on(conversation: Conversation, choice: LossChoice) -> Conversation:
    """Return the conversation with the loss weights of a choice: ms-swift's default, last_round and all.

    "answers" leaves every assistant turn its weight, "last_answer" only the last one; "all" gives a weight of 1 to all
    other text too. What a turn says itself (``loss``, ``loss_scale``) stays.
    """
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
