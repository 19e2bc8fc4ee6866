"""Calls of langchain-openai, run where only it is installed: python langchain_client.py BASE_URL MODEL PICTURE_URL."""

import json
import sys
from typing import Literal

import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

base, model, picture = sys.argv[1:]
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "what?"}]


class Choice(pydantic.BaseModel):
    """What to answer."""

    answer: Literal["yes", "no"]


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Tell the weather."""
    return "rain"


chat = ChatOpenAI(model=model, base_url=base, api_key="none", max_retries=0, max_tokens=6, temperature=0)
longer = chat.model_copy(update={"max_tokens": 300})
question = HumanMessage(content=content)
asked = longer.bind_tools([weather], tool_choice="weather").invoke([question])
(call,) = asked.tool_calls
told = ToolMessage(content=weather.invoke(call["args"]), tool_call_id=call["id"])
print(
    json.dumps(
        {
            "whole": chat.invoke([question]).content,
            "streamed": "".join(chunk.content for chunk in chat.stream([question])),
            "batch": [one.content for one in chat.batch([[question], [question]])],
            "structured": longer.with_structured_output(Choice).invoke("hi").answer,
            "call": call["args"],
            "after_call": chat.bind_tools([weather]).invoke([question, asked, told]).response_metadata["finish_reason"],
        }
    )
)
