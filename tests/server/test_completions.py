"""Raw completions over a scripted engine, as evaluation harnesses ask."""

import pytest

from tests.server.scripted import MODEL


@pytest.fixture
def served(serve):
    return serve()


def complete(served, prompt, **fields):
    return served.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})


def test_the_log_probabilities_of_a_prompt_come_with_its_echo(served):
    # what lm-eval's loglikelihood sends
    body = complete(served, "the cat", echo=True, logprobs=1, max_tokens=1, seed=1234).json()
    (choice,) = body["choices"]
    tokens = served.engine.requests[0].example.tokens.tolist()
    found = choice["logprobs"]
    assert choice["text"] == "the cat" + "the"
    assert found["token_logprobs"] == [None, *(-float(k) for k in range(1, len(tokens))), -0.5]
    assert found["top_logprobs"][0] is None
    assert [choice["text"][at:].startswith(t) for at, t in zip(found["text_offset"], found["tokens"], strict=True)]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"][0] == 0
    nothing = complete(served, "the cat", echo=True, logprobs=1, max_tokens=0).json()
    assert nothing["choices"][0]["text"] == "the cat"
    assert len(nothing["choices"][0]["logprobs"]["tokens"]) == len(tokens)
    assert nothing["usage"]["completion_tokens"] == 0


def test_prompts_of_all_forms_and_an_index_for_each_answer(served):
    ids = served.post("/tokenize", {"prompt": "the cat"}).json()["tokens"]
    for prompt in ("the cat", ids, ["the cat"], [ids]):
        assert complete(served, prompt).status_code == 200
    tokens = [request.example.tokens.tolist() for request in served.engine.requests]
    assert tokens == [ids] * 4
    many = complete(served, ["a", "b"], n=2, max_tokens=2).json()
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["usage"]["completion_tokens"] == 8
    assert complete(served, "a").json()["choices"][0]["finish_reason"] == "stop"
    assert served.engine.requests[-1].sampling.max_tokens == 16


def test_a_stream_joins_to_the_whole(served):
    whole = complete(served, ["a", "b"], max_tokens=6, logprobs=0, echo=True).json()
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 6, "logprobs": 0, "echo": True}
    events = served.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [v for piece in own for v in piece["logprobs"][name]] == choice["logprobs"][name]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [10**6], [-1], {"a": 1}, None, [1, "a"], ["a"] * 300])
def test_prompts_that_are_none_are_refused(served, prompt):
    assert complete(served, prompt).status_code == 400
    assert served.engine.requests == []


def test_a_media_token_among_ids_is_refused(served):
    image = served.service.processor.model.image_token_id
    assert complete(served, [1, image]).status_code == 400


def test_bad_words_reach_the_engine_and_empty_ones_are_refused(served):
    assert complete(served, "the cat", bad_words=["dog", "red cat"]).status_code == 200
    assert served.engine.requests[-1].sampling.bad_words == ("dog", "red cat")
    refused = complete(served, "the cat", bad_words=[""])
    assert refused.status_code == 400
    assert "bad_words" in refused.json()["error"]["message"]
