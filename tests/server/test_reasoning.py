"""Thinking and calls of tools are told apart in the same way however the text is cut into pieces."""

import json
import random

import pytest

from jvlm.inference.requests import Event
from jvlm.server.answers import ChatChoice
from jvlm.server.reasoning import ReasoningSplitter
from jvlm.server.tools import ToolCallReader, parse_call

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}},
        },
    },
}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
TAGGED = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    '<parameter=where>\n{"lat": 59.9}\n</parameter>\n</function>\n</tool_call>'
)
MIMO = "<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>"


def pieces(text, *, seed):
    """The text cut at random; seed 0 cuts it into characters, 1 not at all."""
    if seed < 2:
        return list(text) if seed == 0 else [text]
    rng, found = random.Random(seed), []
    while text:
        size = rng.randint(1, 9)
        found.append(text[:size])
        text = text[size:]
    return found


def answered(text, *, seed=1, begins_inside=False, tools=(WEATHER,), finish="stop", **options):
    """The message, and the deltas of it, that a text becomes."""
    choice = ChatChoice(
        0, splitter=ReasoningSplitter(begins_inside=begins_inside), reader=ToolCallReader(tools), **options
    )
    deltas = []
    for number, piece in enumerate(pieces(text, seed=seed)):
        deltas += choice.feed(Event("r", token=number, text=piece))
    deltas += choice.feed(Event("r", finish_reason=finish))
    return choice, deltas


def joined(deltas):
    """What a client makes of the deltas of a stream."""
    message = {"content": "", "reasoning": "", "calls": []}
    for delta in deltas:
        message["content"] += delta.get("content", "")
        message["reasoning"] += delta.get("reasoning", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["calls"])
                message["calls"].append([call["function"]["name"], ""])
            message["calls"][call["index"]][1] += call["function"]["arguments"]
    return message


CASES = {
    "plain": ("two cats", "two cats", "", []),
    "thinking": ("<think>\nhm, a < b\n</think>\n\ntwo cats\n", "two cats\n", "hm, a < b", []),
    "never closed": ("<think>\nhm", "", "hm", []),
    "no thinking": ("<think>\n\n</think>\n\ntwo", "two", "", []),
    "less than a tag": ("a <thin line </thin> b", "a <thin line </thin> b", "", []),
    "tag later": ("yes <think>no</think>", "yes <think>no</think>", "", []),
    "hermes": (f"let me see\n{HERMES}", "let me see", "", [{"city": "Oslo", "days": 3}]),
    "tagged": (TAGGED, "", "", [{"city": "Oslo", "days": 3, "where": {"lat": 59.9}}]),
    "mimo": (f"<think>x</think>{MIMO}", "", "x", [{"city": "Oslo"}]),
    "two calls": (f"{HERMES}\n{MIMO}", "", "", [{"city": "Oslo", "days": 3}, {"city": "Oslo"}]),
    "no parameters": ('<tool_call>{"name": "weather"}</tool_call>', "", "", [{}]),
    "broken": ("a <tool_call>{oops</tool_call> b", "a <tool_call>{oops</tool_call> b", "", []),
    "cut": ('a <tool_call>{"name": "wea', 'a <tool_call>{"name": "wea', "", []),
    "not closed": ('<tool_call>{"name": "weather", "arguments": {}}', "", "", [{}]),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", CASES)
def test_a_streamed_answer_is_the_unstreamed_one_however_it_is_cut(case, seed):
    text, content, reasoning, arguments = CASES[case]
    choice, deltas = answered(text, seed=seed)
    message, streamed = choice.message(), joined(deltas)
    assert (message["content"] or "") == streamed["content"] == content
    assert (message["reasoning"] or "") == streamed["reasoning"] == reasoning
    assert message["reasoning_content"] == message["reasoning"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert [json.loads(call["arguments"]) for call in calls] == arguments
    assert [[call["name"], call["arguments"]] for call in calls] == streamed["calls"]
    assert choice.finish_reason == ("tool_calls" if arguments else "stop")


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_that_ends_with_an_open_tag_is_answered_by_thinking_first(seed):
    choice, _ = answered("hm </think> yes", seed=seed, begins_inside=True)
    assert (choice.message()["reasoning"], choice.message()["content"]) == ("hm", "yes")


def test_reasoning_tokens_are_counted_and_the_field_can_be_left_out():
    choice, deltas = answered("<think>abc</think>de", seed=0, show_reasoning=False)
    assert choice.message() == {"role": "assistant", "content": "de"}
    assert all("reasoning" not in delta for delta in deltas)
    assert choice.reasoning_tokens == len("abc</think>")


def test_an_answer_cut_by_its_length_says_so_though_it_holds_a_call():
    choice, _ = answered(HERMES, finish="length")
    assert choice.finish_reason == "length"


def test_one_call_is_kept_where_the_caller_wants_no_parallel_ones():
    choice, deltas = answered(f"{HERMES}{MIMO}", one_call=True)
    assert len(choice.message()["tool_calls"]) == len(joined(deltas)["calls"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"name": 3}',
        '{"name": "x", "arguments": 3}',
        '{"name": "x", "arguments": "{"}',
        "<function=x><parameter=a>b</function>",
        "<function=x>words</function>",
        "[" * 100_000,
    ],
)
def test_what_is_no_call_is_none(text):
    assert parse_call(text, [WEATHER]) is None


def test_values_are_read_by_the_schema_and_never_evaluated():
    text = "<function=weather><parameter=city>1</parameter><parameter=days>__import__('os')</parameter></function>"
    assert json.loads(parse_call(text, [WEATHER]).arguments) == {"city": "1", "days": "__import__('os')"}
