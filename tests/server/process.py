"""``jvlm serve`` as a process of its own, with a small random model that knows tools."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests import support

MODEL = "toy"
SIZES = ("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
ONE_AT_A_TIME = ("--max-model-len", "512", "--max-num-seqs", "1", "--max-num-batched-tokens", "64")  # fewer programs
TOOLS_TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}call them as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% for call in message.get('tool_calls') or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_model(folder: Path) -> Path:
    """Write a checkpoint whose chat template knows tools."""
    tokenizer = support.make_tokenizer(folder / "tokenizer", chat_template=TOOLS_TEMPLATE)
    config = support.tiny_config(support.token_ids(tokenizer))
    support.write_folder(folder / "model", tokenizer, config, limits=(4 * 784, 64 * 784))
    support.write_tensors(folder / "model", support.random_tensors(support.tensor_shapes(config)))
    return folder / "model"


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server, from the moment that it is ready to the end of a ``with`` block.

    Args:
      folder: of the model; None for a server before others.
      options: of the command, behind the model and its sizes.
      module: what is run in the place of ``jvlm.cli``, with the same arguments.

    Attributes:
      folder: of the model.
      log: what it printed, after the end.
    """

    def __init__(self, folder: Path | None, *options: str, sizes: tuple[str, ...] = SIZES, module: str = "jvlm.cli"):
        self.port, self.folder, self.log = free_port(), folder, ""
        self.url = f"http://127.0.0.1:{self.port}"
        model = [] if folder is None else [str(folder), "--served-model-name", MODEL, *sizes]
        self._command = [sys.executable, "-m", module, "serve", *model, "--port", str(self.port), *options]

    def __enter__(self) -> ServerProcess:
        self._file = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, cwd=support.ROOT, env=os.environ, stderr=self._file, start_new_session=True
        )
        deadline = time.monotonic() + 400
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end()
                raise AssertionError(self.log[-4000:])
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._end()
        assert kind is not None or self._process.returncode == 0, self.log[-4000:]

    @property
    def process(self) -> psutil.Process:
        """Return the process."""
        return psutil.Process(self._process.pid)

    def _is_ready(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx2.HTTPError:
            return False

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._file.seek(0)
        self.log = self._file.read().decode(errors="replace")
        self._file.close()

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60, **options)

    def chat(self, content: Any = "hi", **fields: Any) -> httpx2.Response:
        """Ask a question, greedily."""
        messages = [{"role": "user", "content": content}]
        body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 4, **fields}
        return self.post("/v1/chat/completions", body)

    def metric(self, name: str) -> float:
        """Return a metric, summed over its labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(name)]
        assert lines, name
        return sum(float(line.rpartition(" ")[2]) for line in lines)
