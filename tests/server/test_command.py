"""``jvlm serve`` as a process, and its options."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from jvlm.cli import deploy, serve
from jvlm.errors import UserError
from jvlm.server.arguments import settings_of
from tests.support import ROOT


@pytest.fixture
def started(monkeypatch):
    """(options of the model, settings) of each command that would start."""
    found = []

    def start(options, arguments, keys=()):
        settings = settings_of(arguments, name="dir", adapters=(), max_model_len=1, keys=keys)
        found.append((options, arguments, settings))
        return 0

    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(deploy, "start", start)
    return found


def test_options_have_the_names_of_vllm(started):
    words = "DIR --port 9 --served-model-name a b --lora x=y --allowed-media-domains a.example --limit-media image=3"
    serve.run([*words.split(), "--max-num-seqs=4", "--no-page"])
    ((options, arguments, settings),) = started
    assert (options.model, options.adapters, arguments.port, arguments.max_num_seqs) == ("DIR", ("x=y",), 9, 4)
    assert (settings.model_name, settings.aliases, settings.page) == ("a", ("b",), False)
    assert (settings.media.domains, settings.media.images, settings.media.videos) == (("a.example",), 3, 1)
    assert "127.0.0.1" in settings.hosts


def test_deploy_has_those_of_ms_swift(started):
    words = "--model DIR --host 0.0.0.0 --api_key secret-of-this-test --adapters x=y --max_pixels 100352"
    deploy.run(words.split())
    ((options, _, settings),) = started
    assert (options.adapters, options.images.max_pixels) == (("x=y",), 100352)
    assert settings.keys == (("api_key", "secret-of-this-test"),)
    assert settings.hosts == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("DIR --host 0.0.0.0", "--api-key-file"),
        ("DIR --limit-media x", "image=16"),
        ("DIR --lora x", "NAME=FOLDER"),
        ("DIR --max-queue 0", "--max_queue"),
        ("--port 1", "--model"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(started, words, said):
    with pytest.raises(UserError, match=said):
        serve.run(words.split())
    assert started == []


@pytest.mark.slow
def test_a_server_starts_answers_and_stops(tiny):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jvlm.cli", "serve", str(tiny.folder), "--port", str(port)]
    sizes = ["--max-model-len", "256", "--max-num-seqs", "2", "--served-model-name", "toy"]
    process = subprocess.Popen(
        [*command, *sizes], cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while True:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            try:
                if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            time.sleep(0.2)
        body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 4
        metrics = httpx2.get(f"{url}/metrics").text
        assert 'jvlm:compilations_total{after_ready="true",engine="0",model_name="toy"} 0.0' in metrics
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert "jvlm serves toy" in errors
    assert "Traceback" not in errors
