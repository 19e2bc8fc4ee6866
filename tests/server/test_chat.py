"""The chat route over a scripted engine: shapes, streams, and what reaches the engine."""

import json
import threading

import httpx2
import pytest

from jvlm.errors import UserError
from jvlm.inference.requests import SamplingParams
from tests.server.scripted import MODEL, until

# every line end that some client's reader of lines knows
LINE_ENDS = "a\u0085b\u2028c\u2029d\x1ce\x0bf\x0cg\r\nh"


@pytest.fixture
def served(serve):
    return serve()


def text_of(events):
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e != "[DONE]" and e["choices"])


def test_an_answer_has_the_fields_that_clients_read(served):
    body = served.chat().json()
    (choice,) = body["choices"]
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert choice["message"] == {
        "role": "assistant",
        "content": "the answer is two.",
        "reasoning": None,
        "reasoning_content": None,
    }
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    usage = body["usage"]
    assert usage["prompt_tokens"] == served.engine.requests[0].example.length
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_is_role_words_finish_and_done_with_usage_only_if_asked(served):
    events = served.chat_stream()
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-2]["choices"][0]["delta"] == {}
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in event for event in events[:-1])
    assert text_of(events) == "the answer is two."
    with_usage = served.chat_stream(stream_options={"include_usage": True})
    assert with_usage[-2]["choices"] == []
    assert with_usage[-2]["usage"] == served.chat().json()["usage"]
    each = served.chat_stream(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in each[:-1]]
    assert counts == sorted(counts)
    assert counts[0] >= 1


def test_no_character_of_an_answer_ends_a_line_of_the_stream(serve):
    served = serve(LINE_ENDS)
    events = served.chat_stream()
    assert text_of(events) == LINE_ENDS == served.chat().json()["choices"][0]["message"]["content"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    raw = served.post("/v1/chat/completions", body).content
    assert all(line == b"" or line.startswith(b"data: ") for line in raw.split(b"\n"))
    assert raw.isascii()


def test_several_answers_have_an_index_each_and_share_one_prompt(served):
    body = served.chat(n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    one = served.chat().json()["usage"]
    assert body["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    events = served.chat_stream(n=2)
    roles = [e["choices"][0]["index"] for e in events[:-1] if "role" in e["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]
    assert served.chat(n=9).status_code == 400


def test_sampling_reaches_the_engine_with_the_checkpoints_defaults(served):
    served.chat()
    served.chat(temperature=0, top_k=-1, seed=-1, stop="x", max_completion_tokens=7, max_tokens=9, ignore_eos=True)
    first, second = (request.sampling for request in served.engine.requests)
    assert (first.temperature, first.top_p) == (0.1, 0.9)  # of generation_config.json
    assert first.max_tokens == 4096 - served.engine.requests[0].example.length
    expected = SamplingParams(temperature=0, top_p=0.9, seed=2**32 - 1, stop=("x",), max_tokens=7, ignore_eos=True)
    assert second == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"allowed_token_ids": [99999]}, "allowed_token_ids"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs.a"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"structured_outputs": {"magic": 1}}, "structured_outputs.magic"),
        ({"structured_outputs": {"boxes": True}}, "structured_outputs.boxes"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"mm_processor_kwargs": {"max_pixels": 10**9}}, "mm_processor_kwargs.max_pixels"),
        ({"media_io_kwargs": {"video": {"num_frames": 10**6}}}, "media_io_kwargs.video.num_frames"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ],
)
def test_a_wrong_field_is_named(served, fields, param):
    answer = served.chat(**fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"], error["code"]) == (param, "BadRequestError", 400)
    assert served.engine.requests == []


def test_a_prompt_longer_than_the_context_is_refused_and_a_long_answer_is_cut_to_it(served):
    answer = served.chat("cat " * 6000)
    assert answer.status_code == 400
    assert "4096" in answer.json()["error"]["message"]
    served.chat(max_tokens=4096)
    request = served.engine.requests[0]
    assert request.sampling.max_tokens == 4096 - request.example.length


def test_unknown_models_are_404_and_adapters_go_by_their_names(serve):
    served = serve(adapters=("cats",), aliases=("toy",))
    missing = served.post("/v1/chat/completions", {"model": "no", "messages": [{"role": "user", "content": "a"}]})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    for name in (MODEL, "toy", "", None, "cats"):
        body = {"model": name, "messages": [{"role": "user", "content": "a"}]}
        assert served.post("/v1/chat/completions", body).status_code == 200
    assert [request.adapter for request in served.engine.requests] == [None] * 4 + ["cats"]
    cards = {card["id"]: card["parent"] for card in served.get("/v1/models").json()["data"]}
    assert cards == {MODEL: None, "toy": None, "cats": MODEL}
    assert served.get("/v1/models/cats").json()["parent"] == MODEL


def test_log_probabilities_are_of_each_token_and_finite(served):
    body = served.chat(logprobs=True, top_logprobs=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "the answer is two."
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    events = served.chat_stream(logprobs=True, top_logprobs=2)
    streamed = [e["choices"][0]["logprobs"] for e in events[:-1]]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs["content"]] == content


def test_token_ids_are_given_where_asked(served):
    body = served.chat(return_token_ids=True).json()
    request = served.engine.requests[0]
    assert body["prompt_token_ids"] == request.example.tokens.tolist()
    ids = body["choices"][0]["token_ids"]
    assert served.service.processor.decode(ids) == "the answer is two."
    events = served.chat_stream(return_token_ids=True)
    assert [i for e in events[:-1] for i in e["choices"][0].get("token_ids", [])] == ids


def test_a_stop_text_ends_the_answer(served):
    choice = served.chat(stop=["is"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        "the answer ",
        "stop",
        "is",
    )


def test_a_beginning_of_the_answer_is_continued(served):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the an"}]
    served.chat(messages, continue_final_message=True, add_generation_prompt=False)
    served.chat(messages[:1])
    continued, plain = (request.example.tokens.tolist() for request in served.engine.requests)
    assert continued[: len(plain)] == plain
    assert served.service.processor.decode(continued[len(plain) :]) == "the an"


def test_a_request_that_the_engine_refuses_is_400_and_later_errors_are_events(serve):
    served = serve()
    served.engine.refuses = UserError("a picture of 9 patches, and 4 fit")
    for answer in (served.chat(), served.chat(stream=True)):
        assert answer.status_code == 400
        assert "9 patches" in answer.json()["error"]["message"]
    served.engine.refuses = None
    assert served.chat().status_code == 200


def test_an_engine_that_fails_ends_every_answer_and_the_health(serve, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    served = serve()
    served.engine.fails = RuntimeError("boom")
    answer = served.chat()
    assert answer.status_code == 503
    assert "boom" not in answer.text
    assert served.get("/health").status_code == 503
    assert served.chat().status_code == 503


def test_a_client_that_goes_away_frees_its_request_streamed_or_not(serve):
    served = serve("word " * 50)
    served.engine.hold.clear()
    for stream in (True, False):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(served.url + "/v1/chat/completions", json=body, timeout=0.3)
    with until() as wait:
        wait(lambda: served.async_engine.in_flight == 0)
        served.engine.hold.set()
        wait(lambda: len(served.engine.aborted) == 2)
        wait(lambda: not served.engine.has_work)
    assert served.chat(max_tokens=1).status_code == 200


def test_health_is_progress_and_not_life(serve):
    served = serve()
    assert served.get("/health").status_code == 200
    served.engine.hold.clear()
    thread = threading.Thread(target=served.chat, daemon=True)
    thread.start()
    with until() as wait:
        wait(lambda: served.get("/health").status_code == 503)  # a step takes longer than it may
        served.engine.hold.set()
        wait(lambda: served.get("/health").status_code == 200)
    thread.join(10)


def test_a_stream_that_waits_shows_signs_of_life(serve):
    served = serve(ping_seconds=0.05)
    served.engine.hold.clear()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx2.stream("POST", served.url + "/v1/chat/completions", json=body, timeout=10) as answer:
        pieces = answer.iter_bytes()
        assert next(pieces).startswith(b": ping\n\n")
        served.engine.hold.set()
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_requests_beyond_the_queue_are_sent_away(serve):
    served = serve(max_queue=0, slots=1)
    served.engine.hold.clear()
    thread = threading.Thread(target=served.chat, daemon=True)
    thread.start()
    with until() as wait:
        wait(lambda: served.engine.has_work)
    answer = served.chat()
    assert answer.status_code == 429
    assert "retry-after" in answer.headers
    served.engine.hold.set()
    thread.join(10)
    assert served.chat().status_code == 200
    assert "vllm:admission_rejections_total" in served.get("/metrics").text


def test_metrics_have_the_names_that_dashboards_and_load_generators_read(served):
    served.chat(made_up_field=1)
    text = served.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:generation_tokens_total",
        'finished_reason="stop"',
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_sum",
        "jvlm:compilations_total",
        "jvlm:ignored_fields_total",
    ):
        assert name in text, name
    assert "made_up_field" not in text
    assert any("made_up_field" in line for line in served.lines)


def test_tools_are_rendered_and_calls_come_back(serve):
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    served = serve(call, tools="on")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    answer = served.chat(tools=[tool])
    assert answer.status_code == 400  # this template writes the same with and without them
    assert "does not use them" in answer.json()["error"]["message"]
    choice = served.chat(tools=[tool], tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == call


def test_version_load_and_unknown_routes(served):
    assert served.get("/load").json() == {"server_load": 0}
    assert set(served.get("/version").json()) == {"version"}
    assert served.get("/v1/nothing").json()["error"]["code"] == 404
    assert served.get("/v1/chat/completions").json()["error"]["code"] == 405
    assert served.get("/openapi.json").status_code == 200


def test_tokens_there_and_back(served):
    found = served.post("/tokenize", {"prompt": "the cat", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "the cat"}
    of_chat = served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    served.chat()
    assert of_chat["tokens"] == served.engine.requests[0].example.tokens.tolist()
    assert served.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_more_likeliest_tokens_than_there_are_is_all_of_them(served):
    assert served.chat(top_k=2**63).status_code == 200
    assert served.engine.requests[0].sampling.top_k == served.service.facts.vocabulary


def test_grammars_reach_the_engine(served):
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    asked = {
        "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        "json_object": {"response_format": {"type": "json_object"}},
        "regex": {"guided_regex": "[ab]+"},
        "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
        "lark": {"ebnf": "start: /a/"},
    }
    for fields in asked.values():
        assert served.chat(**fields).status_code == 200
    grammars = [request.sampling.grammar for request in served.engine.requests]
    assert [grammar.kind for grammar in grammars] == list(asked)
    assert json.loads(grammars[0].value) == schema
    assert grammars[3].choices == ("yes", "no")
    assert all(grammar.after is None for grammar in grammars)
