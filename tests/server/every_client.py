"""Published clients against ``jvlm serve``, each in an environment of its own: `make test-clients`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests import support
from tests.server.process import MODEL, ServerProcess, write_model
from tests.server.test_media import PICTURE, data_url, encoded

ENVIRONMENTS = support.ROOT / ".venv/clients"
CLIENTS = Path(__file__).parent / "clients"
CITIES = ({"city": "Oslo"}, {"city": "Rome"})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with ServerProcess(write_model(tmp_path_factory.mktemp("model"))) as server:
        yield server
        assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def plain(served):
    """The answer to the picture that all clients ask about, as the API gives it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": "what?"}]
    return served.chat(parts, max_tokens=6).json()["choices"][0]["message"]["content"]


def run(client, served):
    """What a client's program prints, as JSON."""
    command = [str(ENVIRONMENTS / client / "bin/python"), "-I", str(CLIENTS / f"{client.split('-')[0]}_client.py")]
    # nothing of this environment is seen, and nobody but the server can be asked
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [*command, f"{served.url}/v1", MODEL, data_url(PICTURE)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_openai(served, plain):
    told = run("openai", served)
    assert told["models"] == [MODEL]
    assert (told["whole"], told["streamed"], told["response"]) == (plain, plain, plain)
    assert told["tokens"][0] == told["tokens"][1] <= 6
    assert {json.dumps(told[name]) for name in ("forced", "streamed_call", "response_call")} <= set(
        map(json.dumps, CITIES)
    )
    assert told["forced_reason"] == "tool_calls"
    assert {told["parsed"], told["response_parsed"]} <= {"yes", "no"}
    assert told["echoed"].startswith("the cat")
    assert told["logprobs"][0] is None
    assert all(value < 0 for value in told["logprobs"][1:])
    assert told["response_kinds"][0] == "response.created"
    assert told["response_kinds"][1] in ("response.completed", "response.incomplete")
    assert told["response_after_call"] in ("completed", "incomplete")
    assert told["failed"] == {"absent": "NotFoundError", "wrong": "BadRequestError", "long": "BadRequestError"}


def test_langchain(served, plain):
    told = run("langchain-openai", served)
    assert (told["whole"], told["streamed"], told["batch"]) == (plain, plain, [plain, plain])
    assert told["structured"] in ("yes", "no")
    assert told["call"] in CITIES
    assert told["after_call"] in ("stop", "length")


def test_litellm(served, plain):
    told = run("litellm", served)
    assert (told["whole"], told["streamed"]) == ([plain, plain], plain)
    assert told["call"] in CITIES
    assert told["text"]
    assert told["failed"] == "NotFoundError"


def test_lmms_eval(served, plain):
    """With torch, transformers and the like of this environment: they take gigabytes."""
    command = [sys.executable, str(CLIENTS / "lmms_client.py"), f"{served.url}/v1", MODEL, data_url(PICTURE)]
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT / ".venv/harness-lmms-eval"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second, third = json.loads(done.stdout.splitlines()[-1])["answers"]
    assert first == third == plain
    assert second
    assert "FAILED" not in second


def test_aiperf_measures_streams_with_pictures(served, tmp_path):
    folder = served.folder
    command = [
        str(ENVIRONMENTS / "aiperf/bin/aiperf"),
        "profile",
        *("--model", MODEL, "--url", served.url, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", str(folder), "--concurrency", "3", "--request-count", "12"),
        *(
            "--synthetic-input-tokens-mean",
            "20",
            "--output-tokens-mean",
            "8",
            "--extra-inputs",
            "ignore_eos:true",
            "--use-server-token-count",
        ),
        *("--image-width-mean", "64", "--image-height-mean", "64", "--ui", "none"),
        *("--output-artifact-dir", str(tmp_path)),
    ]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "no_proxy": "127.0.0.1,localhost"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (file,) = tmp_path.rglob("profile_export_aiperf.json")
    found = json.loads(file.read_text())
    assert found["request_count"]["avg"] == 12
    assert not found.get("error_summary")
    assert found["time_to_first_token"]["avg"] > 0
    assert found["output_sequence_length"]["avg"] == 8


def test_vlmevalkit_reads_the_answers_to_its_requests(served):
    """What its LMDeployAPI and OpenAIWrapper send, read from their source: it installs from its repository alone."""
    model = httpx2.get(f"{served.url}/v1/models").json()["data"][0]["id"]
    jpeg = data_url(encoded(support.picture(80, 60), "JPEG"), "image/jpeg")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-123456"}
    for extra in ({}, {"detail": "low"}, {"max_dynamic_patch": 6}):
        parts = [{"type": "text", "text": "a?"}, {"type": "image_url", "image_url": {"url": jpeg, **extra}}]
        messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": parts}]
        payload = {"model": model, "messages": messages, "max_tokens": 512, "n": 1, "temperature": 0.0}
        answer = httpx2.post(
            f"{served.url}/v1/chat/completions", headers=headers, content=json.dumps(payload), timeout=60
        )
        assert answer.status_code == 200, answer.text
        assert isinstance(json.loads(answer.text)["choices"][0]["message"]["content"].strip(), str)
