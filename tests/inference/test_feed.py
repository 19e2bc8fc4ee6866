"""Many conversations through one engine, without one: a stand-in for it that answers when the test says so."""

from __future__ import annotations

import contextlib
import types

import pytest

from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError
from jvlm.inference import event_loop
from jvlm.inference.feed import Asked, answer_each, in_order
from jvlm.inference.requests import Event, SamplingParams

GREEDY = types.SimpleNamespace(params=lambda number, **fields: SamplingParams(number=number, **fields))


class Engine:
    """Gives each request a token a step, as many as its question says; requests of another size wait for shapes."""

    def __init__(self):
        self.processor = types.SimpleNamespace(encode=self.encode)
        self.running, self.held, self.begun, self.aborted = {}, [], [], []
        self.most_at_once = self.steps = self.sizes = 0
        self.mail = {}

    def encode(self, conversation, generation_prompt):
        text = conversation.messages[0].text
        if text == "bad":
            raise ExampleError(conversation.origin, "messages", "it is bad", "Mend it")
        return types.SimpleNamespace(text=text, length=len(text), origin=conversation.origin)

    def answer_limit(self, example):
        return 100

    @property
    def drains(self):
        return bool(self.held and self.sizes)

    def submit(self, request):
        text = request.example.text
        if text == "refused":
            raise UserError("no such adapter")
        self.begun.append(text)
        if len(text) > self.sizes:
            self.held.append(request)
        else:
            self.running[request.id] = [request, 0]
        self.most_at_once = max(self.most_at_once, len(self.running) + len(self.held))

    def step(self):
        self.steps += 1
        if self.held and not self.running:
            self.sizes = max(len(one.example.text) for one in self.held)
            self.running = {one.id: [one, 0] for one in self.held}
            self.held = []
        events = []
        for name, state in list(self.running.items()):
            state[1] += 1
            text = state[0].example.text
            if text == "broken":
                del self.running[name]
                events.append(Event(name, finish_reason="error", error=UserError("not finite")))
                continue
            ends = state[1] == int(text)
            events.append(Event(name, token=state[1], finish_reason="stop" if ends else None))
            if ends:
                del self.running[name]
        return events

    def abort(self, name):
        if self.running.pop(name, None):
            self.aborted.append(name)

    def run(self, requests, *, most=None):
        return event_loop.run(self, self.mail, requests, most)


def conversations(texts):
    return [
        Asked(n, {"messages": [{"role": "user", "content": t}]}, Origin("f.jsonl", n + 1)) for n, t in enumerate(texts)
    ]


def answers(engine, texts, **options):
    return list(answer_each(engine, conversations(texts), GREEDY, batch_size=1, **options))


def test_the_next_begins_when_one_ends_and_none_waits_for_the_slowest():
    engine = Engine()
    found = answers(engine, ["60", *["02"] * 100])
    assert engine.most_at_once == 8
    assert [len(one.completion.tokens) for one in found[:3]] == [2, 2, 2]
    assert found[-1].asked.number == 0
    assert engine.steps == 60, "seven places for a hundred short answers beside the long one"
    assert all(one.completion.stopped for one in found)
    assert [one.asked.number for one in in_order(found)] == list(range(101))
    assert not engine.mail


def test_prompts_are_ready_for_as_many_as_end_in_one_step():
    engine, read = Engine(), []

    def source():
        for one in conversations(["02"] * 400):
            read.append(one)
            yield one

    with contextlib.closing(answer_each(engine, source(), GREEDY, batch_size=32)) as found:
        next(found)
    assert len(engine.begun) == 8 * 32
    assert len(read) == 9 * 32 - 1, "the one that would begin next is taken, the others are encoded"


def test_what_cannot_be_answered_is_told_beside_what_can():
    engine = Engine()
    found = {one.asked.number: one for one in answers(engine, ["bad", "01", "refused", "broken", "02", "bad"])}
    errors = {number: str(one.error) for number, one in found.items() if one.error is not None}
    assert errors.keys() == {0, 2, 3, 5}
    assert errors[0] == "f.jsonl, line 1, field 'messages': it is bad. Mend it"
    assert (errors[2], errors[3]) == ("no such adapter", "not finite")
    assert [len(found[number].completion.tokens) for number in (1, 4)] == [1, 2]
    assert [one.error is None for one in answers(Engine(), ["bad", "bad"])] == [False, False]


def test_nothing_begins_behind_a_bad_one_where_it_ends_all():
    engine = Engine()
    found = answers(engine, ["01", "02", "bad", *["01"] * 50], ends_at_error=True)
    assert sorted(one.asked.number for one in found) == [0, 1, 2]
    assert engine.begun == ["01", "02"]


def test_larger_shapes_are_made_as_soon_as_what_runs_has_ended_and_not_at_the_end():
    engine = Engine()
    found = answers(engine, [*["03"] * 8, *["01"] * 4, "0004", *["01"] * 60])
    assert len(found) == 73
    assert [one.asked.number for one in found].index(12) < 34
    assert engine.sizes == 4


def test_giving_up_ends_what_runs_and_leaves_nothing():
    engine = Engine()
    with contextlib.closing(answer_each(engine, conversations(["01", *["50"] * 20]), GREEDY, batch_size=1)) as found:
        assert next(found).asked.number == 0
    assert len(engine.aborted) == 7
    assert not engine.running
    assert not engine.mail


def test_an_error_of_the_source_ends_all(tmp_path):
    def source():
        yield from conversations(["05"])
        raise UserError("asked in other words before")

    engine = Engine()
    with pytest.raises(UserError, match="other words"):
        list(answer_each(engine, source(), GREEDY, batch_size=1))
    assert not engine.running
