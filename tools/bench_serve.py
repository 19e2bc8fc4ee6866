"""The server beside its own engine and beside transformers, on this machine, in one run.

    make bench-serve                              # or: python -m tools.bench_serve --rounds 5
    make soak-serve                               # or: python -m tools.bench_serve --only soak --soak 10000

- streams: tokens a second through HTTP at 1, 8 and 32 requests at a time, over those of the engine alone, by turns.
- arrivals: requests with and without pictures that arrive at random times, and transformers' `generate` on the same
  at the same times: one after another, and in batches of all that wait.
- picture: the time to the first token of a second question about a picture, over that of the first.
- soak, where asked for: many requests of mixed kinds; memory, and pages that are used afterwards.

The last table has what each part aims at. Every answer must have as many tokens as were asked for. streams and soak
take a toy, of which the server shows most; arrivals and picture the model of 40 M parameters of tools/bench_model.py.
Both are random and of float32.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from tools import http_load

ROOT = Path(__file__).parents[1]
STREAMS, WORDS, NEW = (1, 8, 32), 12, 128
ARRIVALS, MEAN_SECONDS = 48, 0.1
CONTEXT, SLOTS = 1024, 32
# of each part: what is compared, how it is written, and what is aimed at
AIMS = {
    "streams": (f"tokens/s through HTTP over the engine's, {STREAMS[-1]} requests at a time", "{:.0%}", "at least 60%"),
    "arrivals": ("tokens/s over generate's, one after another, arrivals at random times", "{:.1f} x", "at least 5 x"),
    "picture": ("time to the first token, second question about a picture over the first", "{:.0%}", "at most 20%"),
}


def body(text: str, new: int, *pictures: bytes) -> dict[str, Any]:
    """Return a greedy chat request for so many tokens about PNGs."""
    urls = ["data:image/png;base64," + base64.b64encode(png).decode() for png in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "max_tokens": new, "temperature": 0, "ignore_eos": True}


def drawn(width: int, height: int, seed: int) -> bytes:
    """Return a random PNG whose pixels are not all different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


def texts(count: int, new: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return requests of some words that no two have in common."""
    rng = np.random.default_rng(seed)
    return [body(" ".join(map(str, rng.integers(0, 1000, WORDS))), new) for _ in range(count)]


def mixed(count: int, seed: int = 1, first_picture: int = 0) -> list[dict[str, Any]]:
    """Return requests of 16 to 128 tokens, two of three of them about a picture of 112 to 336 pixels a side.

    Args:
      first_picture: with another number, other pictures of the same sizes.
    """
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        sizes = [28 * rng.integers(4, 13, 2)] if number % 3 else []
        pictures = [drawn(*size, seed=first_picture + number) for size in sizes]
        words = f"question {number}: is there a red shape in the image? " * int(rng.integers(1, 6))
        found.append(body(words, int(rng.integers(16, 129)), *pictures))
    return found


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    """Run ``jvlm serve``; yields its port and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS), "--max-queue", "4096"]
    command = [sys.executable, "-m", "jvlm.cli", "serve", str(folder), "--port", str(port), "--no-log-requests"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, *sizes, *options], cwd=ROOT, stderr=log)
        try:
            while not _is_healthy(port):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended: {log.read()[-2000:].decode()}")
                time.sleep(0.2)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


class Worker:
    """Another process with a model, which answers when it is told to: the engine, or transformers."""

    def __init__(self, kind: str, folder: Path):
        command = [sys.executable, "-m", "tools.bench_serve_workers", kind, str(folder)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Worker:
        self._process.stdout.readline()  # it is ready
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def ask(self, **task: Any) -> dict[str, Any]:
        """Return what the process answers."""
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def metrics(port: int) -> dict[str, float]:
    """Return the server's metrics without their labels, summed."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    found: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        plain = name.partition("{")[0] + ("{after_ready}" if 'after_ready="true"' in name else "")
        found[plain] = found.get(plain, 0.0) + float(value)
    return found


def measure_streams(folder: Path, rounds: int) -> float:
    """Print tokens a second through HTTP and without; returns their ratio with the most requests at a time."""
    options = ("--max-num-batched-tokens", "256")
    print(
        "\n| requests at a time | HTTP, tokens/s | engine alone | ratio | TTFT ms p50/p90/p99 | TPOT ms p50/p90/p99 |"
    )
    print("| ---: | ---: | ---: | ---: | --- | --- |")
    with Worker("engine", folder) as engine, served(folder, *options) as (port, _):
        for streams in STREAMS:
            bodies = texts(max(4, 3 * streams), NEW)
            http_load.ask_at_once(port, bodies, streams)
            engine.ask(bodies=bodies, streams=streams)
            through, alone, answers = [], [], []
            for _ in range(rounds):
                answers.append(http_load.ask_at_once(port, bodies, streams))
                through.append(http_load.tokens_per_second(answers[-1]))
                alone.append(engine.ask(bodies=bodies, streams=streams)["tokens_per_second"])
            best = answers[int(np.argmax(through))]
            shown = [f"{a:.1f} / {b:.1f} / {c:.1f}" for a, b, c in http_load.percentiles(best).values()]
            speeds = f"{max(through):,.0f} | {max(alone):,.0f} | {max(through) / max(alone):.0%}"
            print(f"| {streams} | {speeds} | {' | '.join(shown)} |", flush=True)
        _check_compilations(port)
    return max(through) / max(alone)


def measure_arrivals(folder: Path, rounds: int) -> float:
    """Print the throughput of requests that arrive at random times, and transformers' on the same.

    Returns:
      the ratio to transformers one after another, which is what a program that calls `generate` for each does.
    """
    bodies = mixed(ARRIVALS)
    times = np.cumsum(np.random.default_rng(2).exponential(MEAN_SECONDS, ARRIVALS)).tolist()
    with served(folder, "--max-num-batched-tokens", "1024") as (port, _):
        http_load.ask_at_once(port, mixed(4, seed=3), 4)
        runs = []
        for number in range(rounds):  # with other pictures, and a text before them, nothing is found in the caches
            others = mixed(ARRIVALS, first_picture=1000 * number)
            fresh = [_with_beginning(one, f"round {number}. ") for one in others]
            runs.append(http_load.ask_at_times(port, fresh, times))
        _check_compilations(port)
    ours = max(map(http_load.tokens_per_second, runs))
    best = max(runs, key=http_load.tokens_per_second)
    with Worker("transformers", folder) as oracle:
        theirs = {way: oracle.ask(bodies=bodies, times=times, way=way) for way in ("singly", "batched")}
    print(
        f"\n{ARRIVALS} requests, {MEAN_SECONDS} s between two on average, {sum(b['max_tokens'] for b in bodies)} tokens"
    )
    print("\n| | tokens/s | jvlm is faster by | TTFT ms p50/p90/p99 |\n| --- | ---: | ---: | --- |")
    first = " / ".join(f"{value:,.0f}" for value in http_load.percentiles(best)["TTFT"])
    print(f"| jvlm serve, through HTTP | {ours:,.0f} | | {first} |")
    for way, name in (("singly", "one after another"), ("batched", "all that wait, as a batch")):
        speed = theirs[way]["tokens_per_second"]
        print(f"| transformers' generate, {name} | {speed:,.0f} | {ours / speed:.1f} x | |", flush=True)
    return ours / theirs["singly"]["tokens_per_second"]


def _with_beginning(request: dict[str, Any], text: str) -> dict[str, Any]:
    (message,) = request["messages"]
    return {**request, "messages": [{**message, "content": [{"type": "text", "text": text}, *message["content"]]}]}


def measure_picture(folder: Path, rounds: int) -> float:
    """Print the times to the first token of a first and of a second question about a picture; returns their ratio."""
    first, second = [], []
    with served(folder, "--max-num-batched-tokens", "1024") as (port, _):
        for number in range(rounds + 1):  # the first time, files are read and processes begin
            picture = drawn(784, 588, seed=100 + number)
            for times, text in ((first, "what is it?"), (second, "which color has the car on the left?")):
                (one,) = http_load.ask_at_once(port, [body(text, 8, picture)], 1)
                times.append(1e3 * one.first_seconds)
        _check_compilations(port)
    a, b = float(np.median(first[1:])), float(np.median(second[1:]))
    print("\n| a picture of 784 x 588, TTFT | ms |\n| --- | ---: |")
    print(f"| first question | {a:,.0f} |\n| second question | {b:,.0f} |\n| share | {b / a:.0%} |", flush=True)
    return b / a


def measure_soak(folder: Path, count: int) -> None:
    """Print memory and pages over many requests. Raises RuntimeError where something is left behind."""
    kinds = mixed(60, seed=4) + texts(60, 32, seed=5)
    kinds = [{**one, "max_tokens": min(one["max_tokens"], 32)} for one in kinds]
    rng, sizes = np.random.default_rng(6), []
    with served(folder, "--max-num-batched-tokens", "256") as (port, process):
        began = time.perf_counter()
        for start in range(0, count, 500):
            chosen = [kinds[int(i)] for i in rng.integers(0, len(kinds), min(500, count - start))]
            http_load.ask_at_once(port, [_with_beginning(one, f"{rng.integers(1e9)} ") for one in chosen], SLOTS)
            sizes.append(_memory(process) / 2**20)
            print(f"  {start + len(chosen):,} requests, {sizes[-1]:,.0f} MiB", file=sys.stderr, flush=True)
        seconds, counts = time.perf_counter() - began, metrics(port)
        _check_compilations(port)
    settled = sizes[len(sizes) // 5]  # the caches are full
    growth = sizes[-1] / settled - 1
    left = {
        name: counts[f"vllm:{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    }
    print(
        f"\nsoak: {count:,} requests in {seconds:,.0f} s, memory {settled:,.0f} to {sizes[-1]:,.0f} MiB ({growth:+.1%})"
    )
    print(f"left: {left}; compilations after ready: {counts['jvlm:compilations_total{after_ready}']:.0f}")
    if any(left.values()) or (len(sizes) > 4 and growth > 0.05):
        raise RuntimeError("the server keeps something of requests that have ended")


def _memory(process: psutil.Process) -> int:
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def _check_compilations(port: int) -> None:
    after = metrics(port)["jvlm:compilations_total{after_ready}"]
    if after:
        raise RuntimeError(f"{after:.0f} programs were compiled after the server was ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=(*AIMS, "soak"), default=tuple(AIMS))
    parser.add_argument("--soak", type=int, default=10_000, metavar="N", help="requests of the soak")
    arguments = parser.parse_args()
    only, reached = arguments.only, {}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    load = f"{os.getloadavg()[0]:.1f} processes busy before"
    print(f"{os.cpu_count()} cores, {platform.machine()}, {load}, float32, {time.strftime('%d %B %Y')}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as top:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(top) / "programs"))
        folders = {}
        for size in {"toy" if part in ("streams", "soak") else "small" for part in only}:
            folders[size] = Path(top) / size
            make = [sys.executable, "-m", "tools.bench_serve_workers", size, str(folders[size])]
            subprocess.run(make, cwd=ROOT, check=True)
        if "streams" in only:
            reached["streams"] = measure_streams(folders["toy"], arguments.rounds)
        if "arrivals" in only:
            reached["arrivals"] = measure_arrivals(folders["small"], arguments.rounds)
        if "picture" in only:
            reached["picture"] = measure_picture(folders["small"], arguments.rounds)
        if "soak" in only:
            measure_soak(folders["toy"], arguments.soak)
    if reached:
        print("\n| | reached | aim |\n| --- | ---: | ---: |")
    for part, value in reached.items():
        what, form, aim = AIMS[part]
        print(f"| {what} | {form.format(value)} | {aim} |")
    print(f"\n{time.perf_counter() - began:,.0f} s", flush=True)


if __name__ == "__main__":
    main()
