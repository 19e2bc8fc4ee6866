"""Calls of tools through HTTP, with a chat template that knows tools and an engine that writes given texts."""

import json

import llguidance
import pytest

from jvlm.server.tools import call_grammar
from tests.server.process import TOOLS_TEMPLATE
from tests.server.scripted import ScriptedEngine, Served, processor_of

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
TAGS = (
    "<tool_call><function=weather><parameter=city>Oslo</parameter><parameter=days>2</parameter></function></tool_call>"
)
MEANT = {"city": "Oslo", "days": 2}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return processor_of(tmp_path_factory.mktemp("tools"), None, chat_template=TOOLS_TEMPLATE)


@pytest.fixture
def serve(processor):
    started = []

    def start(text):
        started.append(Served(ScriptedEngine(processor, text), processor))
        return started[-1].__enter__()

    yield start
    for server in started:
        server.__exit__()


def joined(events):
    """(content, names, arguments) of a stream."""
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    names = [call["function"]["name"] for call in calls if "name" in call["function"]]
    arguments = ["" for _ in names]
    for call in calls:
        arguments[call["index"]] += call["function"]["arguments"]
    return "".join(delta.get("content") or "" for delta in deltas), names, arguments


@pytest.mark.parametrize("text", [HERMES, TAGS])
def test_calls_come_as_calls_streamed_and_not(serve, text):
    served = serve(f"let me see. {text}{text}")
    choice = served.chat(tools=[TOOL]).json()["choices"][0]
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert [(c["type"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls] == [
        ("function", "weather", MEANT)
    ] * 2
    assert len({call["id"] for call in calls}) == 2
    events = served.chat_stream(tools=[TOOL])
    content, names, arguments = joined(events)
    assert content.strip() == choice["message"]["content"].strip() == "let me see."
    assert (names, [json.loads(one) for one in arguments]) == (["weather"] * 2, [MEANT] * 2)
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    one = served.chat(tools=[TOOL], parallel_tool_calls=False).json()["choices"][0]["message"]["tool_calls"]
    assert len(one) == 1


def test_the_template_writes_tools_calls_and_their_results(serve):
    served = serve("rain.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert served.chat(messages, tools=[TOOL]).status_code == 200
    prompt = served.service.processor.tokenizer.decode(served.engine.requests[0].example.tokens)
    assert '"name": "weather"' in prompt.partition("<|im_start|>user")[0]
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>' in prompt
    assert "<|im_start|>tool\nrain<|im_end|>" in prompt
    assert served.chat(messages, tools=[TOOL], tool_choice="none").status_code == 200
    hidden = served.service.processor.tokenizer.decode(served.engine.requests[1].example.tokens)
    assert "parameters" not in hidden


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
        ("auto", None),
        (None, None),
    ],
)
def test_a_choice_of_tools_becomes_a_grammar(serve, choice, names):
    served = serve(HERMES)
    assert served.chat(tools=[TOOL, OTHER], tool_choice=choice).status_code == 200
    grammar = served.engine.requests[0].sampling.grammar
    if names is None:
        assert grammar is None
    else:
        assert {name for name in ("weather", "time") if f'"{name}"' in grammar.value} == names


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', True),
        ('<tool_call>\n{"name":"weather","arguments":{"city":"Oslo","days":2}}\n</tool_call>', True),
        ('<tool_call>\n{\n    "name": "weather",\n    "arguments": {}\n}\n</tool_call>', True),
        ("<tool_call>\n{" + " " * 20 + '"name"', False),  # models write blanks without end where they may
        ('<tool_call>\n{"name": "weather", "arguments": {' + "\n" * 20, False),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "more"', False),
        ('<tool_call>\n{"name": "other"', False),
        ('<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>', True),
        ('<tool_call>\n{"name": "nothing", "arguments": {"a"', False),
        ("hi", False),
    ],
)
def test_the_grammar_of_a_call_takes_calls_and_few_blanks(text, fits):
    tokenizer = llguidance.LLTokenizer("byte")
    nothing = {"type": "function", "function": {"name": "nothing"}}
    matcher = llguidance.LLMatcher(tokenizer, call_grammar([TOOL, nothing]), log_level=0)
    tokens = list(text.encode())
    assert (matcher.validate_tokens(tokens) == len(tokens)) == fits


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"},
    ],
)
def test_choices_that_mean_nothing_are_refused(serve, fields):
    assert serve("a").chat(**fields).status_code == 400


def test_a_call_that_is_none_stays_text_and_is_counted(serve):
    served = serve("<tool_call>not a call</tool_call> sorry")
    choice = served.chat(tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "<tool_call>not a call</tool_call> sorry"
    assert "jvlm:broken_tool_calls_total" in served.get("/metrics").text
