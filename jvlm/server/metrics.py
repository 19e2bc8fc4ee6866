"""/metrics, under vLLM's names so that its dashboards and load generators read them, and jvlm's own.

Labels are from closed sets: nothing that a caller writes becomes one.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jvlm.inference.async_engine import Answer
from jvlm.inference.requests import EngineStats, Event

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_COUNTS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_ONES = (1, 2, 5, 10, 20)
_GAUGES = {
    "num_requests_running": "Answers that are decoded",
    "num_requests_waiting": "Requests before their first prefill",
    "kv_cache_usage_perc": "Used share of the cache's pages, 1 is all",
}
_COUNTERS = {
    "prefix_cache_queries": "Tokens of prompts looked up in the prefix cache",
    "prefix_cache_hits": "Tokens of prompts found in it",
    "mm_cache_queries": "Images looked up in the feature cache",
    "mm_cache_hits": "Images found in it",
    "num_preemptions": "Answers that gave up their pages and were computed anew",
    "prompt_tokens": "Tokens of prompts",
    "prompt_tokens_cached": "Tokens of prompts that were not computed anew",
    "generation_tokens": "Generated tokens",
    "spec_decode_num_drafts": "Guesses of some tokens",
    "spec_decode_num_draft_tokens": "Guessed tokens",
    "spec_decode_num_accepted_tokens": "Guessed tokens that were right",
}
_REASONS = ("stop", "length", "abort", "error")
_LOGGED_NAMES = 64
_MOST_ANSWERS = 10_000


class Metrics:
    """What the server counts, and what it reads of the engine when it is asked.

    Args:
      model: label of everything.
      stats: gives the engine's statistics, at once.
      cache: facts for cache_config_info.
      log: takes a line for the first use of each ignored field.
    """

    def __init__(
        self,
        model: str,
        stats: Callable[[], EngineStats],
        *,
        cache: Mapping[str, str] = MappingProxyType({}),
        log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        self.registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": model, "engine": "0"}
        self._log, self._ignored_names = log, set()
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From a request to its first token", _FIRST)
        self._between = StepHistogram("vllm:inter_token_latency_seconds", "Between tokens of an answer", _TOKEN)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Time for a token after the first, on average", _TOKEN
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From a request to its end", _WHOLE)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Before the engine has a request", _WHOLE)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "From there to the first token", _WHOLE)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "From the first token to the last", _WHOLE)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "In the engine", _WHOLE)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt", _COUNTS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens of an answer", _COUNTS)
        self._n = self._histogram("vllm:request_params_n", "n", _ONES)
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens", _COUNTS)
        self._step_tokens = StepHistogram("vllm:iteration_tokens_total", "Tokens of a step", _COUNTS)
        self._fetch = self._histogram("jvlm:media_fetch_seconds", "Reading a request's media", _FIRST)
        self._decoding = self._histogram("jvlm:media_decode_seconds", "Decoding a request's media", _FIRST)
        self._rejections = self._counter("vllm:admission_rejections", "Requests sent away because too many wait")
        self._ignored = self._counter("jvlm:ignored_fields", "Fields of requests that are not read")
        self._broken_calls = self._counter("jvlm:broken_tool_calls", "Calls of tools that are none, given as text")
        self._last_event: dict[tuple[str, int], float] = {}
        self.adapters: list[str] = []  # names for lora_requests_info
        of_steps = (self._between, self._step_tokens)
        self.registry.register(_EngineCollector(self._labels, stats, lambda: self.adapters, dict(cache), of_steps))

    def render(self) -> bytes:
        """Return everything in Prometheus' text form."""
        return generate_latest(self.registry)

    def step(self, events: Iterable[Event], seconds: float) -> None:
        """Note the events of one step of the engine; called in its thread."""
        now, last, gaps, count = time.monotonic(), self._last_event, [], 0
        if len(last) > _MOST_ANSWERS:  # of answers that were given up in the middle of a step
            last.clear()
        for event in events:
            if event.token is None:
                continue
            count += 1
            key = event.request_id, event.index
            before = last.get(key)
            if before is not None:
                gaps.append(now - before)
            if event.finish_reason is None:
                last[key] = now
            elif before is not None:
                del last[key]
        if count:
            self._step_tokens.add([count])
            self._between.add(gaps)

    def ended(self, answer: Answer, began: float, prompt: int, generated: int) -> None:
        """Note a request at its end.

        Args:
          began: `time.monotonic` when it arrived.
        """
        for index in range(answer.request.sampling.n):
            self._last_event.pop((answer.request.id, index), None)
        self._n.observe(answer.request.sampling.n)
        self._max_tokens.observe(answer.request.sampling.max_tokens)
        if not answer.first:
            return
        self._first.observe(answer.first - began)
        self._whole.observe(answer.last - began)
        self._queue.observe(answer.submitted - began)
        self._prefill.observe(answer.first - answer.submitted)
        self._decode.observe(answer.last - answer.first)
        self._inference.observe(answer.last - answer.submitted)
        if generated > 1:
            self._per_token.observe((answer.last - answer.first) / (generated - 1))
        self._prompt.observe(prompt)
        self._generated.observe(generated)

    def media(self, fetch: float, decode: float) -> None:
        """Note the reading of a request's media."""
        self._fetch.observe(fetch)
        self._decoding.observe(decode)

    def rejected(self) -> None:
        """Note a request that was sent away."""
        self._rejections.inc()

    def broken_call(self, count: int) -> None:
        """Note calls of tools that could not be read."""
        self._broken_calls.inc(count)

    def ignored(self, names: Iterable[str]) -> None:
        """Count fields that are not read, and log each name once."""
        for name in names:
            self._ignored.inc()
            if name not in self._ignored_names and len(self._ignored_names) < _LOGGED_NAMES:
                self._ignored_names.add(name)
                self._log(f"jvlm: the field {name[:64]!a} of a request is not read")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, self._labels.keys(), buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, self._labels.keys(), registry=self.registry).labels(**self._labels)


class StepHistogram:
    """A histogram that takes what a step of the engine gives at once: one thread adds, others read.

    prometheus_client's own takes a lock for each value, which is too much for each token.
    """

    def __init__(self, name: str, text: str, buckets: tuple[float, ...]):
        self.name, self.text, self.buckets = name, text, (*buckets, float("inf"))
        self._counts, self._sum = [0] * len(self.buckets), 0.0

    def add(self, values: Sequence[float]) -> None:
        """Note values."""
        for value in values:
            self._counts[bisect.bisect_left(self.buckets, value)] += 1
        self._sum += sum(values)

    def metric(self, labels: Mapping[str, str]) -> Metric:
        """Return it as Prometheus has it: each bucket counts what is in those before, too."""
        names = ["+Inf" if limit == float("inf") else str(float(limit)) for limit in self.buckets]
        totals = list(zip(names, itertools.accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self.name, self.text, labels=list(labels))
        family.add_metric(list(labels.values()), totals, self._sum)
        return family


class _EngineCollector(Collector):
    """The engine's own numbers."""

    def __init__(
        self,
        labels: dict[str, str],
        stats: Callable[[], EngineStats],
        adapters: Callable[[], list[str]],
        cache: dict[str, str],
        of_steps: tuple[StepHistogram, ...],
    ):
        self._labels, self._stats, self._adapters, self._cache = labels, stats, adapters, cache
        self._of_steps = of_steps

    def collect(self) -> Iterable[Metric]:
        yield from (histogram.metric(self._labels) for histogram in self._of_steps)
        stats, values = self._stats(), list(self._labels.values())
        for name, text in _GAUGES.items():
            yield self._one(GaugeMetricFamily, f"vllm:{name}", text, {(): getattr(stats, name)})
        for name, text in _COUNTERS.items():
            yield self._one(CounterMetricFamily, f"vllm:{name}", text, {(): getattr(stats, name)})
        reasons = collections.Counter({reason: stats.request_success.get(reason, 0) for reason in _REASONS})
        success = CounterMetricFamily(
            "vllm:request_success", "Answers by how they ended", labels=[*self._labels, "finished_reason"]
        )
        for reason in _REASONS:
            success.add_metric([*values, reason], reasons[reason])
        yield success
        yield self._info("vllm:lora_requests_info", "Adapters", {"adapters": ",".join(self._adapters())})
        yield self._info("vllm:cache_config_info", "The cache", self._cache)
        own = {
            "encoder_cache_usage_perc": (GaugeMetricFamily, stats.encoder_cache_usage_perc),
            "encoder_patches": (CounterMetricFamily, stats.encoder_patches),
            "host_gap_seconds": (CounterMetricFamily, stats.host_gap_seconds),
        }
        for name, (kind, value) in own.items():
            yield self._one(kind, f"jvlm:{name}", name.replace("_", " "), {(): value})
        compilations = CounterMetricFamily(
            "jvlm:compilations", "Programs compiled", labels=[*self._labels, "after_ready"]
        )
        compilations.add_metric([*values, "false"], stats.compilations - stats.compilations_after_ready)
        compilations.add_metric([*values, "true"], stats.compilations_after_ready)
        yield compilations
        padding = GaugeMetricFamily(
            "jvlm:padding_ratio", "Share of a program's places without use", labels=[*self._labels, "program"]
        )
        for program, ratio in stats.padding_ratio.items():
            padding.add_metric([*values, program], ratio)
        yield padding

    def _one(self, kind: type, name: str, text: str, found: dict[tuple[str, ...], float]) -> Metric:
        family = kind(name, text, labels=list(self._labels))
        for more, value in found.items():
            family.add_metric([*self._labels.values(), *more], value)
        return family

    def _info(self, name: str, text: str, facts: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*self._labels, *facts])
        family.add_metric([*self._labels.values(), *facts.values()], 1)
        return family
