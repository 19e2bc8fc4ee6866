"""Requests beside others get what they get alone; nothing is compiled after the warm-up; nothing is left behind."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jvlm.data import packing
from jvlm.errors import UserError
from jvlm.inference import faults
from jvlm.inference.engine import Engine
from jvlm.inference.programs import TABLE, DecodeRows
from jvlm.inference.requests import EngineConfig, Grammar, Request, SamplingParams, StepFailed
from jvlm.models import vlm
from jvlm.training.supervised import token_log_probs
from tests.inference.support import prompt
from tests.support import picture

SMALL = EngineConfig(
    max_slots=4,
    max_model_len=192,
    num_pages=64,
    prefill_tokens=(64,),
    encode_patches=(256,),
    feature_slots=256,
    decode_slots=(4,),
)
ASKED = {
    "text": (prompt("what is the answer?"), {}),
    "long": (prompt("where is the cat on the chair? " * 8), {}),
    "picture": (prompt("what is in <image> this picture?", images=[picture(140, 84)]), {}),
    "two pictures": (prompt("<image>is <image>it?", images=[picture(84, 112), picture(140, 56, 1)]), {}),
    "same picture": (prompt("<image>where?", images=[picture(140, 84)]), {}),
    "drawn": (prompt("is it red?"), {"temperature": 1.3, "seed": 7}),
    "filtered": (prompt("a dog?"), {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
    "ruled": (
        prompt("no, two"),
        {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.2,
            "logit_bias": {40: 2.0},
            "min_tokens": 3,
        },
    ),
    "two answers": (prompt("<image>yes?", images=[picture(84, 84)]), {"temperature": 1.0, "n": 2, "seed": 3}),
    "limited": (prompt("which?"), {"allowed_token_ids": (30, 31, 32, 33), "temperature": 1.0}),
}


def requests(tiny, names=tuple(ASKED), **fields):
    return [
        Request(
            name,
            tiny.processor.encode(ASKED[name][0], generation_prompt=True),
            SamplingParams(**{"max_tokens": 8, "stop_token_ids": (), "logprobs": 2} | fields | ASKED[name][1]),
        )
        for name in names
    ]


def collect(events):
    """Tokens, log-probabilities and texts of each answer."""
    found: dict[tuple[str, int], tuple[list, list, str]] = {}
    for event in events:
        tokens, values, text = found.get((event.request_id, event.index), ([], [], ""))
        if event.token is not None:
            tokens, values = [*tokens, event.token], [*values, event.logprob.logprob if event.logprob else None]
        found[event.request_id, event.index] = tokens, values, text + event.text
    return found


def answers(engine, asked):
    return collect(engine.run(asked))


@pytest.fixture(scope="module")
def engine(tiny):
    """One whose programs are all compiled."""
    engine = Engine(tiny.model, tiny.processor, SMALL)
    reported = {}
    engine.warm_up(reported.__setitem__)
    assert len(reported) <= 40
    assert all(seconds >= 0 for seconds in reported.values())
    return engine


@pytest.fixture(scope="module")
def alone(tiny, engine):
    """What each request gets with nothing beside it, and no page or feature of another."""
    found = {}
    for request in requests(tiny):
        for scheduler in engine._schedulers:
            scheduler.forget()
        found |= answers(engine, [request])
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (tokens, values, text) in expected.items():
        assert found[name][0] == tokens, name
        np.testing.assert_allclose(found[name][1], values, atol=1e-4, err_msg=str(name))
        assert found[name][2] == text


class Compilations:
    """Counts what XLA compiles, whoever asks for it."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, name, seconds, **_):
        self.count += name == "/jax/core/compile/backend_compile_duration"


def test_mixed_requests_get_what_each_gets_alone_and_nothing_is_compiled(tiny, engine, alone):
    counted = Compilations()
    for scheduler in engine._schedulers:
        scheduler.forget()
    assert_same(answers(engine, requests(tiny)), alone)
    assert_same(answers(engine, requests(tiny, tuple(ASKED)[::-1])), alone)  # now from cached pages and features
    stats = engine.stats()
    assert stats.compilations_after_ready == counted.count == 0
    assert stats.prefix_cache_hits > 0
    assert stats.mm_cache_hits > 0
    assert stats.num_requests_running == stats.num_requests_waiting == 0
    assert stats.kv_cache_usage_perc == 0
    assert len({tuple(tokens) for tokens, _, _ in alone.values()}) >= len(alone) - 2


def test_steps_that_wait_for_the_host_change_nothing(tiny, engine, alone, monkeypatch):
    monkeypatch.setattr(engine, "ahead", False)
    assert_same(answers(engine, requests(tiny)), alone)


def test_requests_come_and_go_while_others_run(tiny, engine, alone):
    asked = requests(tiny)
    late, events, aborted = asked[5:], [], "long"
    for request in asked[:5]:
        engine.submit(request)
    while engine.has_work:
        events += engine.step()
        if late and len(events) > 3:
            engine.submit(late.pop())
        if aborted and any(e.request_id == aborted for e in events):
            engine.abort(aborted)
            aborted = None
    ended = [e.request_id for e in events if e.finish_reason == "abort"]
    assert ended == ["long"]
    found = collect([e for e in events if e.finish_reason != "abort"])
    cut = found.pop(("long", 0))
    expected = dict(alone)
    whole = expected.pop(("long", 0))
    assert cut[0] == whole[0][: len(cut[0])]
    assert_same(found, expected)
    assert engine.stats().kv_cache_usage_perc == 0


def test_text_that_is_not_streamed_comes_with_the_last_token(tiny, engine, alone):
    texts: dict[tuple[str, int], list[str]] = {}
    for event in engine.run(requests(tiny, stream=False)):
        texts.setdefault((event.request_id, event.index), []).append(event.text)
    assert {name: text[-1] for name, text in texts.items()} == {name: text for name, (_, _, text) in alone.items()}
    assert not any(text for pieces in texts.values() for text in pieces[:-1])
    ended = alone["text", 0][2][:2]
    stopped = requests(tiny, ("text",), stream=False, stop=(ended,))
    assert answers(engine, stopped)["text", 0][2] == ""


def test_a_stop_ends_an_answer_and_is_not_in_its_text(tiny, engine, alone):
    tokens, _, text = alone["text", 0]
    (asked,) = requests(tiny, ("text",), stop_token_ids=(tokens[3],))
    *_, last = engine.run([asked])
    assert (last.token, last.finish_reason, last.stop_reason) == (tokens[3], "stop", tokens[3])
    stop = text[len(text) // 2 :][:3]
    (asked,) = requests(tiny, ("text",), stop=(stop,))
    events = list(engine.run([asked]))
    assert "".join(e.text for e in events) == text[: text.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", stop)
    (asked,) = requests(tiny, ("text",), stop_token_ids=(tokens[0],), min_tokens=4)
    found = [e.token for e in engine.run([asked])]
    assert len(found) >= 5
    assert tokens[0] not in found[:4]


@pytest.mark.parametrize("name", ["picture", "long"])
def test_log_probabilities_of_a_prompt_are_those_of_a_whole_pass_and_of_the_trainer(tiny, engine, name):
    (asked,) = requests(tiny, (name,), prompt_logprobs=3)
    first, *_ = engine.run([asked])
    example = asked.example
    assert (example.length > SMALL.prefill_tokens[-1]) == (name == "long")  # in several chunks
    batch = packing.assemble([[example]], 192, example.num_patches)
    values = np.asarray(jax.nn.log_softmax(tiny.model(batch)[0]))
    trained = np.asarray(
        token_log_probs(tiny.model, dataclasses.replace(batch, loss_weights=np.ones_like(batch.loss_weights)))
    )
    given = [one.logprob for one in first.prompt_logprobs[1:]]
    np.testing.assert_allclose(given, trained[0, : example.length - 1], atol=1e-4)
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == example.length
    for place, found in enumerate(first.prompt_logprobs[1:]):
        assert found.token == example.tokens[place + 1]
        assert found.logprob == pytest.approx(values[place, found.token], abs=1e-4)
        np.testing.assert_allclose([v for _, v in found.top], np.sort(values[place])[::-1][:3], atol=1e-4)


def test_other_parameters_are_used_at_once_and_compile_nothing(tiny, engine, alone):
    values = {path: v.get_value() for path, v in vlm.parameters(tiny.model).items()}
    changed = {**values, "decoder.head.kernel": values["decoder.head.kernel"][:, ::-1]}
    counted = Compilations()
    engine.load(changed)
    assert answers(engine, requests(tiny, ("text",)))["text", 0][0] != alone["text", 0][0]
    engine.load(tiny.model)
    assert_same(answers(engine, requests(tiny, ("text",))), {("text", 0): alone["text", 0]})
    assert engine.stats().compilations_after_ready == 0
    assert counted.count <= 1  # the reversal itself
    with pytest.raises(UserError, match="not those of this model"):
        engine.load({**values, "decoder.other": values["decoder.head.kernel"]})


def test_what_does_not_fit_is_refused_and_a_name_is_taken_once(tiny, engine):
    (asked,) = requests(tiny, ("text",))
    long = tiny.processor.encode(prompt("where is the cat? " * 60), generation_prompt=True)
    with pytest.raises(UserError, match="tokens of prompt and answer, and at most 192 fit"):
        engine.submit(Request("too long", long, asked.sampling))
    with pytest.raises(UserError, match="5 answers, and at most 4 fit"):
        engine.submit(dataclasses.replace(asked, sampling=SamplingParams(n=5)))
    with pytest.raises(UserError, match="logit_bias has the id 99999"):
        engine.submit(dataclasses.replace(asked, sampling=SamplingParams(logit_bias={99999: 1.0})))
    engine.submit(asked)
    with pytest.raises(UserError, match="'text' is there already"):
        engine.submit(asked)
    engine.abort("text")
    assert [e.finish_reason for e in engine.step()] == ["abort"]
    assert not engine.has_work


def test_an_answer_under_a_grammar_is_one_of_its_texts_beside_free_ones(tiny, engine, alone):
    grammar = Grammar("choice", choices=("red circle", "a blue dog"))
    constrained = requests(tiny, ("drawn",), grammar=grammar, max_tokens=40, stop_token_ids=None)
    free = requests(tiny, ("text", "picture"))
    found = answers(engine, [*constrained, *free])
    assert found.pop(("drawn", 0))[2] in grammar.choices
    assert_same(found, {key: alone[key] for key in found})
    assert engine.stats().compilations_after_ready == 0
    with pytest.raises(UserError, match="grammar"):
        engine.submit(requests(tiny, ("text",), grammar=Grammar("regex", value="(("))[0])
    assert not engine.has_work


def test_few_pages_make_answers_wait_and_change_none(tiny, alone):
    few = dataclasses.replace(SMALL, num_pages=26, prefix_cache=False)
    engine = Engine(tiny.model, tiny.processor, few)
    names = ("long", "picture", "drawn", "text", "two answers")
    for _ in range(2):
        found = answers(engine, requests(tiny, names, max_tokens=8))
    assert_same(found, {key: value for key, value in alone.items() if key[0] in names})


def pointers(arrays):
    return {(a.unsafe_buffer_pointer(), a.unsafe_buffer_pointer() + a.nbytes) for a in arrays}


def test_decoding_shares_the_memory_of_the_models_parameters(tiny, engine):
    owned = pointers(engine._given)
    for begin, end in pointers(engine._decoder_leaves):
        assert any(low <= begin and end <= high for low, high in owned)
    assert len(engine._decoder_leaves) > len(jax.tree.leaves(nnx.state(tiny.model.decoder)))


def test_parameters_released_are_taken_again_and_compile_nothing(tiny, engine, alone):
    engine.release()
    engine.load(tiny.model)
    assert_same(answers(engine, requests(tiny, ("picture",))), {("picture", 0): alone["picture", 0]})
    assert engine.stats().compilations_after_ready == 0


def test_a_decoding_step_updates_the_cache_in_place_and_copies_no_weight(tiny, engine):
    device = engine._device
    rows = DecodeRows(np.zeros((4, TABLE + engine.shapes.tables[0]), np.int32))
    state = device.pages(), device.last_tokens(), device.slot_rules()
    lowered = device.programs.decode.lower(engine._decoder_leaves, *state, rows, device.banned, device.free_mask(4))
    memory = lowered.compile().memory_analysis()
    cache = sum(x.nbytes for x in jax.tree.leaves(device.pages()))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache


def test_a_picture_that_cannot_be_computed_ends_its_request_alone(tiny, engine, alone):
    bad, *others = requests(tiny, ("same picture", "picture", "text", "two pictures"))
    example = bad.example
    bad = dataclasses.replace(bad, id="bad", example=dataclasses.replace(example, patches=example.patches[:, :-1]))
    events = list(engine.run([*others, bad]))
    (failed,) = [event for event in events if event.request_id == "bad"]
    assert failed.finish_reason == "error"
    assert isinstance(failed.error, StepFailed)
    found = collect([event for event in events if event is not failed])
    assert_same(found, {key: alone[key] for key in found})
    assert len(found) == 3
    stats = engine.stats()
    assert stats.kv_cache_usage_perc == stats.encoder_cache_usage_perc == stats.compilations_after_ready == 0


@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_of_the_device_ends_all_requests_and_the_engine_says_whether_it_goes_on(
    tiny, engine, alone, monkeypatch, lasting
):
    asked = requests(tiny, ("text", "picture", "two answers"))
    decode, calls = engine._device.programs.decode, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: an uncorrectable error")
        return decode(*arguments)

    failing._cache_size = decode._cache_size  # the engine asks what was compiled
    with monkeypatch.context() as patch:
        patch.setattr(engine._device.programs, "decode", failing)
        if lasting:
            patch.setattr(faults, "lasting_failure", lambda leaves: "the parameters are lost")
        for request in asked:
            engine.submit(request)
        events = []
        while engine.has_work:
            events += engine.step()
    ended = {event.request_id: event for event in events if event.finish_reason == "error"}
    assert len(calls) == 1
    assert ended.keys() == {request.id for request in asked}
    assert all("uncorrectable" in str(event.error) for event in ended.values())
    if lasting:
        assert "lost" in engine.failure
        with pytest.raises(StepFailed, match="start it anew"):
            engine.submit(asked[0])
        engine.failure = None
    assert engine.failure is None
    assert_same(answers(engine, requests(tiny)), alone)
    assert engine.stats().compilations_after_ready == 0
