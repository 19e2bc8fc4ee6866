"""ChatML with tools and thinking, as Qwen3-VL's templates write it."""

from __future__ import annotations

from jvlm.data.chat_format import ChatFormat

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"

# For tokenizers that bring no template. Tools and their calls are JSON between tags; answers of tools go into a user
# turn; what is thought stands in the answer as it was given.
TEMPLATE = """\
{%- macro words(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
      {%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
      {%- else -%}{{ part.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set given = messages[0].role == 'system' -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if given -%}{{- words(messages[0].content) + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' -}}
  {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- elif given -%}
  {{- '<|im_start|>system\\n' + words(messages[0].content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' + words(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set asked = call.function or call -%}
      {%- set written = asked.arguments if asked.arguments is string else asked.arguments | tojson -%}
      {{- '\\n' if message.content or not loop.first -}}
      {{- '<tool_call>\\n{"name": "' + asked.name + '", "arguments": ' + written + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' -}}
    {{- '\\n<tool_response>\\n' + words(message.content) + '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' -}}
  {%- elif not (loop.first and given) -%}
    {{- '<|im_start|>' + message.role + '\\n' + words(message.content) + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {{- '<think>\\n' if enable_thinking is defined and enable_thinking -}}
{%- endif -%}
"""

CHAT_FORMAT = ChatFormat(
    TEMPLATE,
    image="<|image_pad|>",
    video="<|video_pad|>",
    media_prefix=VISION_START,
    media_suffix=VISION_END,
    box_format="json_1000",
)
