"""Calls of the openai package, run where only it is installed: python openai_client.py BASE_URL MODEL PICTURE_URL."""

import json
import sys
from typing import Literal

import openai
import pydantic

base, model, picture = sys.argv[1:]
client = openai.OpenAI(base_url=base, api_key="none", max_retries=0)
content = [{"type": "image_url", "image_url": {"url": picture, "detail": "high"}}, {"type": "text", "text": "what?"}]
messages = [{"role": "user", "content": content}]
parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
parameters["additionalProperties"] = False
tool = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": parameters}}


class Choice(pydantic.BaseModel):
    answer: Literal["yes", "no"]


create = client.chat.completions.create
options = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 6}
whole = create(**options)
usage = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(create(**options, **usage))
forced = create(**{**options, "max_tokens": 300}, tools=[tool], tool_choice="required")
named = {"type": "function", "function": {"name": "weather"}}
with client.chat.completions.stream(**{**options, "max_tokens": 300}, tools=[tool], tool_choice=named) as stream:
    for _ in stream:
        pass
    streamed_call = stream.get_final_completion().choices[0].message.tool_calls[0].function.parsed_arguments
parsed = client.chat.completions.parse(**{**options, "max_tokens": 100}, response_format=Choice)
completion = client.completions.create(model=model, prompt="the cat", max_tokens=3, logprobs=1, echo=True)
items = [
    {
        "role": "user",
        "content": [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": "what?"}],
    }
]
response = client.responses.create(model=model, input=items, max_output_tokens=6, temperature=0, store=False)
function = {"type": "function", "name": "weather", "parameters": parameters, "strict": True}
called = client.responses.create(model=model, input="hi", tools=[function], tool_choice="required", store=False)
shaped = client.responses.parse(model=model, input="hi", text_format=Choice, max_output_tokens=100, store=False)
with client.responses.stream(model=model, input="hi", max_output_tokens=6, temperature=0) as stream:
    events = list(stream)
call = called.output[-1]
turns = [{"role": "user", "content": "hi"}, call.model_dump()]
turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
answered = client.responses.create(model=model, input=turns, tools=[function], max_output_tokens=6, store=False)
failed = {}
for name, change in (("absent", {"model": "no"}), ("wrong", {"temperature": -1}), ("long", {"max_tokens": 10**6})):
    try:
        create(**{**options, **change})
    except openai.APIStatusError as error:
        failed[name] = type(error).__name__
print(
    json.dumps(
        {
            "models": [one.id for one in client.models.list()],
            "whole": whole.choices[0].message.content,
            "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "tokens": [whole.usage.completion_tokens, chunks[-1].usage.completion_tokens],
            "forced": json.loads(forced.choices[0].message.tool_calls[0].function.arguments),
            "forced_reason": forced.choices[0].finish_reason,
            "streamed_call": streamed_call,
            "parsed": parsed.choices[0].message.parsed.answer,
            "echoed": completion.choices[0].text,
            "logprobs": completion.choices[0].logprobs.token_logprobs,
            "response": response.output_text,
            "response_call": json.loads(call.arguments),
            "response_parsed": shaped.output_parsed.answer,
            "response_streamed": events[-1].response.output_text,
            "response_kinds": [events[0].type, events[-1].type],
            "response_after_call": answered.status,
            "failed": failed,
        }
    )
)
