"""verl: a prompt as messages, and the answer that a reward compares with."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import Fields, listed
from jvlm.data.formats.messages import prompt_messages
from jvlm.data.values import is_null, shown


def _matches(record: dict[str, Any]) -> bool:
    return bool(listed(record.get("prompt"))) and not is_null(record.get("reward_model"))


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    messages = prompt_messages(fields.need("prompt")[1], origin, "prompt", "user")
    _, reward = fields.need("reward_model")
    if not isinstance(reward, dict):
        raise ExampleError(origin, "reward_model", f"{shown(reward)} is not an object", "Give style and ground_truth")
    truth = reward.get("ground_truth")
    solution = {} if is_null(truth) else {"solution": truth}
    return {**fields.rest(), "reward_model": reward, **solution, "messages": messages}


VERL = Format("verl", "prompt, a list of messages, and reward_model", _matches, _convert)
