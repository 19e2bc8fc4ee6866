"""Tools in a row reach the chat template as transformers gives them to it, or the example is refused."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from jvlm import families
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.processor import Processor
from jvlm.data.template import ChatTemplate
from tests.chat_templates import FORMATS, KINDS, make

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Says "sunny" or <rainy>.\nIn é.',
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "<|im_end|>"]}}},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "weather in Oslo?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "content": "22 degrees"}
SAID = {"role": "assistant", "content": "It is 22 degrees."}

CHATS = {
    "a call and its answer": [ASKED, CALLED, ANSWERED, SAID],
    "two calls at once": [ASKED, {**CALLED, "tool_calls": [CALL, CALL]}, ANSWERED, ANSWERED, SAID],
    "a call at the end": [ASKED, CALLED],
    "no call": [ASKED, SAID],
}


def encode(template, example, **options):
    conversation = parse_example(example, Origin("examples.jsonl", 3))
    options = {"generation_prompt": False, "origin": conversation.origin, **options}
    return template.tokenize(conversation.messages, tools=conversation.tools, **options)


@pytest.fixture(scope="module")
def made():
    found = {}
    for kind in KINDS:
        for name in ("qwen3", "mistral"):
            tokenizer = make(kind, FORMATS[name])
            found[kind, name] = ChatTemplate(tokenizer, families.get("composed").chat_format), tokenizer
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "trimmed" not in kind])
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@pytest.mark.parametrize("chat", CHATS)
def test_tools_and_calls_are_written_and_learnt_as_transformers_does(made, kind, name, chat):
    template, tokenizer = made[kind, name]
    tools = json.loads(json.dumps([WEATHER]).replace("<|im_end|>", "Bergen"))
    messages = CHATS[chat]
    options = {"tools": tools, "return_dict": True}
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    for given in (tools, json.dumps(tools)):
        ids, weights, _ = encode(template, {"messages": messages, "tools": given})
        np.testing.assert_array_equal(ids, theirs["input_ids"])
        mask = np.asarray(theirs["assistant_masks"], bool)
        assert tokenizer.decode(ids[weights > 0]).split() == tokenizer.decode(ids[mask]).split()
        assert weights[ids == tokenizer.eos_token_id][-1] == 1
    theirs = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    ids, weights, _ = encode(template, {"messages": messages[:-1], "tools": tools}, generation_prompt=True)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    assert not weights.any()


def test_a_call_that_ends_with_a_token_of_its_own_is_learnt_up_to_it():
    """As Llama 3.1's built-in tools: <|eom_id|> where the model waits for the tool, <|eot_id|> elsewhere."""
    form = FORMATS["llama3"]
    tokenizer = make("byte level", form, more=("<|eom_id|>", "<|python_tag|>"))
    tokenizer.chat_template = """
        {%- for m in messages %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
        {%- if m.tool_calls %}{{- '<|python_tag|>' + m.tool_calls[0].function.name + '()<|eom_id|>' }}
        {%- else %}{{- m.content + '<|eot_id|>' }}{% endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
    template = ChatTemplate(tokenizer, families.get("composed").chat_format)
    ids, weights, turn = encode(template, {"messages": [ASKED, CALLED, ANSWERED, SAID]})
    learnt = [tokenizer.decode(ids[(weights > 0) & (turn == n)]) for n in (1, 2)]
    assert learnt == ["<|python_tag|>get_weather()<|eom_id|>", "It is 22 degrees.<|eot_id|>"]


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_text_of_tools_is_text(made, name):
    template, tokenizer = made["byte level", name]
    end = tokenizer.eos_token
    tools = json.loads(json.dumps([WEATHER]).replace("<|im_end|>", end))
    call = {"function": {"name": "get_weather", "arguments": {"city": f"{end}{end}"}}}
    messages = [ASKED, {**CALLED, "tool_calls": [call]}, {**ANSWERED, "content": f"22{end}"}, SAID]
    plain = json.loads(json.dumps([tools, messages]).replace(end, ""))
    counts = [
        int((encode(template, {"messages": m, "tools": t})[0] == tokenizer.eos_token_id).sum())
        for t, m in ((tools, messages), plain)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "call",
    [
        {"id": "123456789", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
        {"name": "get_weather", "arguments": {"city": "Oslo"}},
    ],
    ids=["OpenAI's", "flat"],
)
def test_calls_in_other_forms_are_written_alike(made, call):
    template, _ = made["byte level", "qwen3"]
    alike = [
        encode(template, {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [c]}], "tools": []})
        for c in (call, CALL)
    ]
    np.testing.assert_array_equal(alike[0][0], alike[1][0])


def test_every_kind_of_no_tools(tiny):
    example = {"messages": [ASKED, SAID]}
    expected = tiny.processor.encode(example).tokens
    for nothing in (None, [], "", "[]", "null"):
        np.testing.assert_array_equal(tiny.processor.encode({**example, "tools": nothing}).tokens, expected)


UNUSED = {
    "tools": ({"messages": [ASKED, SAID], "tools": [WEATHER]}, "field 'tools': the chat template does not use them"),
    "tools as JSON": ({"messages": [ASKED, SAID], "tools": json.dumps([WEATHER])}, "field 'tools': the chat template"),
    "calls": ({"messages": [ASKED, CALLED, ANSWERED, SAID]}, "the chat template does not use tool_calls"),
}


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_a_template_that_does_not_use_them_is_said(tiny, name, generation_prompt):
    example, says = UNUSED[name]
    with pytest.raises(ExampleError, match=says):
        tiny.processor.encode(parse_example(example, Origin("examples.jsonl", 3)), generation_prompt=generation_prompt)


def test_a_tokenizer_with_a_template_of_its_own_for_tools(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    processor = Processor(tokenizer, tiny.model.config)
    example = {"messages": [ASKED, SAID]}
    np.testing.assert_array_equal(processor.encode(example).tokens, tiny.processor.encode(example).tokens)
    told = processor.encode({**example, "tools": [WEATHER]})
    assert "get_weather" in tokenizer.decode(told.tokens)
    assert (told.tokens == tokenizer.eos_token_id).sum() == 3


BAD = {
    "not JSON": ({"tools": "[{"}, "'tools': not JSON"),
    "deep JSON": ({"tools": "[" * 100_000}, "'tools': JSON that is too deep"),
    "a number": ({"tools": 3}, "'tools': a int, not a list"),
    "a list of names": ({"tools": ["get_weather"]}, r"'tools\[0\]': 'get_weather' is not the schema"),
    "calls by the user": ({"messages": [{**ASKED, "tool_calls": [CALL]}, SAID]}, r"messages\[0\].tool_calls'"),
    "a call without a name": ({"messages": [ASKED, {**CALLED, "tool_calls": [{}]}]}, r"tool_calls\[0\]': no function"),
    "arguments in words": (
        {"messages": [ASKED, {**CALLED, "tool_calls": [{"name": "f", "arguments": "Oslo"}]}]},
        r"arguments': not JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tools_that_are_none_are_refused_with_their_field(name):
    change, says = BAD[name]
    with pytest.raises(ExampleError, match=f"examples.jsonl, line 3, field .*{says}"):
        parse_example({"messages": [ASKED, SAID], **change}, Origin("examples.jsonl", 3))
