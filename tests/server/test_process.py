"""``jvlm serve`` as a process with a small model: what its options and routes do together."""

import concurrent.futures
import io
import json
import re

import av
import numpy as np
import pytest

import jvlm
from jvlm import cli
from jvlm.adapters.peft_write import write_peft
from tests import support
from tests.adapters.random_adapter import random_adapter
from tests.server.process import MODEL, ONE_AT_A_TIME, SIZES, ServerProcess, free_port, write_model
from tests.server.test_media import PICTURE, data_url

pytestmark = pytest.mark.slow
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


def clip(frames=6, size=(56, 56)):
    """A small MP4 whose frames are grey, one lighter than the other."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            image = np.full((*size[::-1], 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    top = tmp_path_factory.mktemp("served")
    model = write_model(top)
    base = jvlm.load(model)[0]
    for seed, name in enumerate(("cats", "dogs"), 1):
        write_peft(random_adapter(base, seed, rank=4), base.config, top / "adapters" / name)
    options = ["--lora", f"cats={top / 'adapters/cats'}", "--max-loras", "2", "--adapter-root", str(top / "adapters")]
    options += ["--memory-fraction", "0.5", "--compile-cache", str(top / "programs"), "--log-interval", "0.5"]
    with ServerProcess(model, *options) as server:
        yield server
        assert server.metric('jvlm:compilations_total{after_ready="true"') == 0
    assert f"jvlm serves {MODEL}" in server.log
    assert "pages of cache within the memory" in server.log
    assert "tokens/s generated" in server.log
    assert any((top / "programs").iterdir())
    assert "Traceback" not in server.log


def content(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_one_of_the_tools_whatever_the_model_would_say(served, choice):
    answer = served.chat("hi", tools=[TOOL, TIME], tool_choice=choice, max_tokens=300)
    assert answer.status_code == 200, answer.text
    chosen = answer.json()["choices"][0]
    (call,) = chosen["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert (call["function"]["name"], chosen["finish_reason"]) in {("weather", "tool_calls"), ("time", "tool_calls")}
    if call["function"]["name"] == "weather":
        assert arguments in ({"city": "Oslo"}, {"city": "Rome"})
    else:
        assert (choice, arguments) == ("required", {})


def test_adapters_by_the_names_of_models(served):
    before = content(served.chat("what?", max_tokens=8))
    cats = content(served.chat("what?", max_tokens=8, model="cats"))
    assert served.chat("what?", model="dogs").status_code == 404
    loaded = served.post("/v1/load_lora_adapter", {"lora_name": "dogs", "lora_path": "dogs"})
    assert loaded.status_code == 200, loaded.text
    dogs = content(served.chat("what?", max_tokens=8, model="dogs"))
    assert len({before, cats, dogs}) == 3
    assert content(served.chat("what?", max_tokens=8)) == before
    assert content(served.chat("what?", max_tokens=8, model="cats")) == cats
    assert served.post("/v1/unload_lora_adapter", {"lora_name": "dogs"}).status_code == 200
    cards = {card["id"]: card["parent"] for card in served.get("/v1/models").json()["data"]}
    assert cards == {MODEL: None, "cats": MODEL}


def test_videos_come_as_files_and_as_frames(served):
    url = data_url(clip(), "video/mp4")
    part = {"type": "video_url", "video_url": {"url": url}}
    tokens = []
    for frames in (2, 4):
        answer = served.chat(
            [part, {"type": "text", "text": "what?"}], media_io_kwargs={"video": {"num_frames": frames}}
        )
        assert answer.status_code == 200, answer.text
        tokens.append(answer.json()["usage"]["prompt_tokens_details"]["multimodal_tokens"])
    assert tokens[1] == 2 * tokens[0] > 0
    swift = served.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "<video>what?"}],
            "videos": [url],
            "max_tokens": 4,
            "temperature": 0,
        },
    )
    assert content(swift) == content(served.chat([part, {"type": "text", "text": "what?"}]))


def test_boxes_beside_the_messages_are_written_as_the_model_reads_them(served):
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "<image>what is in <bbox>, the <ref-object>?"}],
        "images": [data_url(PICTURE)],
        "objects": {"ref": ["cat"], "bbox": [[10, 20, 40, 50]]},
        "max_tokens": 4,
        "temperature": 0,
    }
    found = served.post("/tokenize", body)
    assert found.status_code == 200, found.text
    text = served.post("/detokenize", {"tokens": found.json()["tokens"]}).json()["prompt"]
    assert "cat" in text
    assert "<bbox>" not in text
    (width, height), (seen_width, seen_height) = found.json()["images_size"][0], found.json()["jvlm_processed_size"][0]
    assert (width, height) == (80, 60)
    box = [round(v * s) for v, s in zip((10, 20, 40, 50), (seen_width / 80, seen_height / 60) * 2, strict=True)]
    numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in text.partition("what is in")[2]).split()]
    assert all(abs(a - b) <= 1 for a, b in zip(numbers[:4], box, strict=True))
    assert served.post("/v1/chat/completions", body).status_code == 200
    wrong = {**body, "objects": {"bbox": [[1, 2, 3]]}}
    assert served.post("/v1/chat/completions", wrong).status_code == 400
    assert served.post("/v1/chat/completions", {**body, "images": []}).status_code == 400


def test_a_second_question_about_a_picture_finds_it_in_the_cache(served):
    picture = {"type": "image_url", "image_url": {"url": data_url(PICTURE)}}
    queries, hits = (served.metric(f"vllm:{name}_cache_hits_total") for name in ("mm", "prefix"))
    patches = served.metric("jvlm:encoder_patches_total")
    for text in ("a first question", "another one"):
        assert served.chat([picture, {"type": "text", "text": text}]).status_code == 200
    assert served.metric("jvlm:encoder_patches_total") - patches <= 64
    assert served.metric("vllm:mm_cache_hits_total") + served.metric("vllm:prefix_cache_hits_total") > queries + hits


def logprobs(server):
    """Of the first tokens after some prompts."""
    body = {"model": MODEL, "max_tokens": 1, "temperature": 0, "logprobs": 0}
    answers = [
        server.post("/v1/completions", {**body, "prompt": f"question {k}: what is it?"}).json() for k in range(6)
    ]
    return np.array([answer["choices"][0]["logprobs"]["token_logprobs"][0] for answer in answers])


def test_quantised_matrices_answer_nearly_as_whole_ones(served):
    with ServerProcess(served.folder, "--quantization", "int8", sizes=ONE_AT_A_TIME) as server:
        quantised = logprobs(server)
    assert 0 < np.abs(logprobs(served) - quantised).max() < 0.1


def test_a_share_of_memory_that_does_not_hold_an_answer_is_refused_before_anybody_can_ask(served, capfd):
    options = ("--port", str(free_port()), "--memory-fraction", "0.000001")
    assert cli.main(["serve", str(served.folder), *SIZES, *options]) == 2
    said = capfd.readouterr().err
    assert re.search(r"0 pages of .* fit into memory_fraction 1e-06", said)
    assert "Traceback" not in said
    assert "jvlm serves" not in said


def test_a_deterministic_server_on_two_devices_with_a_cache_of_8_bits_answers_as_ever_beside_others(
    served, monkeypatch
):
    """It shares the model among the devices of its host, and the first token, which reads no cache, is that of one."""
    for name, value in support.cpu_devices(2).items():
        monkeypatch.setenv(name, value)
    options = ("--deterministic", "--kv-cache-dtype", "fp8", "--compile-cache", str(served.folder.parent / "programs"))
    with ServerProcess(served.folder, *options) as server:
        np.testing.assert_allclose(logprobs(server), logprobs(served), atol=1e-4)

        def answer(k):
            return content(server.chat(f"question {k}", max_tokens=12, temperature=1, seed=k))

        alone = [answer(k) for k in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert list(threads.map(answer, range(4))) == alone
        assert len(set(alone)) == 4
    assert "the model is on 2 devices: tensor 2" in server.log
