"""Compiling all programs of an engine before its first request."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jvlm.inference import plan_arrays, programs, sampling
from jvlm.inference.device_state import COPIES, picture_batch, vision_tokens_of
from jvlm.inference.programs import Chunks, DecodeRows

if TYPE_CHECKING:
    from jvlm.inference.device_state import DeviceState

# Programs that are compiled side by side, each by a thread of its own: the compiler is not bound by Python's lock. Each
# takes memory of the host, up to gigabytes for large models.
_MOST_TOGETHER = 8

Report = Callable[[str, float], None]


def warm_up(state: DeviceState, report: Report) -> None:
    """Compile every program for every shape, and run each once.

    Args:
      report: called with the name and the seconds of each, in this thread.
    """
    s, config = state.shapes, state.engine.config
    _timed(report, "cache", state.pages)
    _timed(report, "features", state.pool)
    state.last_tokens()
    _timed(report, "rules", state.slot_rules)
    _compile_side_by_side(state, report)
    for batch, destinations in _encodes(state):
        state.run_encode(batch, destinations, _nobody(state))
    indices = np.zeros((s.groups, s.prefill_rows), np.int32)
    samplings = np.repeat(state.no_sampling[None], s.groups * s.prefill_rows, axis=0)
    for C in s.prefill_tokens:
        for _, chunks in _prefills(state, C):
            hidden = state.run_prefill(chunks, _nobody(state))
        following = np.zeros((s.groups, C), np.int32)
        _timed(
            report,
            f"scores of {C} prompt tokens",
            lambda hidden=hidden, following=following: state.run_prompt_logprobs(hidden, following),
        )
        mask = state.free_mask(len(samplings))
        _timed(report, f"first after {C}", lambda h=hidden, mask=mask: state.run_first(h, indices, samplings, mask))
    for _, rows, drafts in _decodes(state):
        state.run_decode(rows, drafts, _decode_mask(state, rows, drafts))
    pages = np.zeros((s.groups, COPIES), np.int32)
    _timed(report, "copies", lambda: state.run_copy(pages, pages))
    _timed(report, "scrubbing", lambda: state.run_scrub(pages))
    V = config.decoder.vocab_size
    none = np.zeros(V, bool)
    rules = np.zeros(V, np.float32), none, none, np.zeros(V, np.int32)
    _timed(report, "rules of a slot", lambda: state.run_set_rules(0, *rules))


def _timed(report: Report, name: str, run: Callable[[], Any]) -> None:
    began = time.perf_counter()
    jax.block_until_ready(run())
    report(name, time.perf_counter() - began)


def _compile_side_by_side(state: DeviceState, report: Report) -> None:
    """Compile the programs that take longest: whoever calls them afterwards finds them compiled."""
    # the main thread traces the next ones meanwhile
    with ThreadPoolExecutor(min(_MOST_TOGETHER, os.cpu_count() or 1), "jvlm-compile") as threads:
        compiling: collections.deque[tuple[str, Future[float]]] = collections.deque()

        def report_first() -> None:
            name, one = compiling.popleft()
            report(name, one.result())

        try:
            for name, program, arguments in _large(state):
                compiling.append((name, threads.submit(_seconds_to_compile, program.lower(*arguments))))
                while compiling and compiling[0][1].done():
                    report_first()
            while compiling:
                report_first()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # those that have begun cannot be stopped
            raise


def _seconds_to_compile(lowered: jax.stages.Lowered) -> float:
    began = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - began


def _large(state: DeviceState) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (name, program, arguments)."""
    s, found = state.shapes, state.programs
    for batch, destinations in _encodes(state):
        arguments = state.encode_arguments(batch, destinations, _nobody(state))
        yield f"encode {batch.patches.shape[1]}", found.encode, arguments
    for C in s.prefill_tokens:
        for name, chunks in _prefills(state, C):
            yield name, found.prefill, state.prefill_arguments(chunks, _nobody(state))
    for name, rows, drafts in _decodes(state):
        arguments = state.decode_arguments(rows, drafts, _decode_mask(state, rows, drafts))
        yield name, found.decode if drafts is None else found.verify, arguments


def _nobody(state: DeviceState) -> np.ndarray:
    return np.zeros(state.shapes.groups, np.int32)


def _encodes(state: DeviceState) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield (batch, destinations) of each size, without pictures."""
    s, config = state.shapes, state.engine.config
    for P in s.encode_patches:
        destinations = np.full((s.groups, vision_tokens_of(config, P)), s.feature_slots, np.int32)
        yield picture_batch(config, s.groups, P), destinations


def _prefills(state: DeviceState, tokens: int) -> Iterator[tuple[str, Chunks]]:
    """Yield (name, chunks) of each size of so many tokens, without prompts."""
    s = state.shapes
    for M in s.past:
        if M and tokens not in s.prefill_tokens_with_past:
            continue
        for F in s.prefill_features or (tokens,):
            images = f" with {F} vision tokens" if s.prefill_features else ""
            yield f"prefill {tokens} after {M} pages{images}", plan_arrays.no_chunks(s, tokens, M, F)


def _decodes(state: DeviceState) -> Iterator[tuple[str, DecodeRows, np.ndarray | None]]:
    """Yield (name, rows, drafted tokens) of each size, without sequences."""
    s, K = state.shapes, state.engine.sizes.draft_tokens
    for count in (rows * s.groups for rows in s.decode_rows):
        for W in s.tables:
            empty = np.zeros((count, programs.TABLE + W), np.int32)
            empty[:, : sampling.COLUMNS] = state.no_sampling
            name = f"decode {count} of {W} pages"
            yield name, DecodeRows(empty), None
            if K:
                yield f"{name} with {K} drafted tokens", DecodeRows(empty), np.zeros((count, K), np.int32)


def _decode_mask(state: DeviceState, rows: DecodeRows, drafts: np.ndarray | None) -> Any:
    return state.free_mask(len(rows.rows) * (1 if drafts is None else 1 + drafts.shape[1]))
