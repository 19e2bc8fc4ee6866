"""Calls of litellm, run where only it is installed: python litellm_client.py BASE_URL MODEL PICTURE_URL."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the Internet

import litellm

base, model, picture = sys.argv[1:]
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "what?"}]
options = {"messages": [{"role": "user", "content": content}], "api_base": base, "api_key": "none", "temperature": 0}
parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}


def ask(kind, **more):
    return litellm.completion(model=f"{kind}/{model}", **{**options, "max_tokens": 6, **more})


called = ask("openai", tools=[tool], tool_choice="required", max_tokens=300).choices[0].message.tool_calls[0].function
try:
    litellm.completion(model="hosted_vllm/no", **options)
    failed = None
except litellm.NotFoundError as error:
    failed = type(error).__name__
print(
    json.dumps(
        {
            "whole": [ask(kind).choices[0].message.content for kind in ("openai", "hosted_vllm")],
            "streamed": "".join(c.choices[0].delta.content or "" for c in ask("hosted_vllm", stream=True)),
            "call": json.loads(called.arguments),
            "text": litellm.text_completion(
                model=f"text-completion-openai/{model}", prompt="the cat", api_base=base, api_key="none", max_tokens=3
            )
            .choices[0]
            .text,
            "failed": failed,
        }
    )
)
