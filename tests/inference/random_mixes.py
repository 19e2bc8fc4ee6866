"""Random mixes of requests: each gets what it gets alone, whatever is cached, cut, preempted, adapted or aborted.

python -m tests.inference.random_mixes --mixes 200 --families qwen2_5_vl gated
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jvlm.adapters import several
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Event, Request, SamplingParams
from jvlm.models.vlm import VLMConfig
from jvlm.training import starting_model
from tests.adapters.random_adapter import random_adapter
from tests.inference import many_devices
from tests.parallel import models

TARGETS = ("decoder", "encoder", "connector")  # of adapters

FAMILIES = {**many_devices.MODELS, "qwen3_vl": models.qwen3_vl()}
ADAPTED = ("qwen2_5_vl",)  # has two adapters of the language model and of the towers
SIZES = EngineConfig(
    max_slots=6, prefill_tokens=(32, 64), encode_patches=(256,), num_pages=48, feature_slots=96, decode_slots=(6,)
)
ENGINES = {
    "caches": SIZES,
    "few pages": dataclasses.replace(SIZES, num_pages=9),
    "cut prompts, one token at a time": dataclasses.replace(SIZES, prefill_tokens=(16,), decode_steps=1, ahead=False),
    "drafts": dataclasses.replace(SIZES, draft_tokens=3),
}
COMMON = {"stop_token_ids": (), "detokenize": False}
SAMPLINGS = (
    {"max_tokens": 20},
    {"max_tokens": 7},
    {"max_tokens": 12, "temperature": 1.0, "n": 2},
    {"max_tokens": 9, "temperature": 0.8, "top_k": 30, "min_p": 0.01},
    {"max_tokens": 14, "repetition_penalty": 1.3, "frequency_penalty": 0.1, "min_tokens": 3},
    {"max_tokens": 25, "stop_token_ids": (7, 33, 90)},
)


@dataclasses.dataclass(frozen=True)
class Mixes:
    """What was found.

    Attributes:
      answers: different answers of requests alone.
      hits, preemptions, drafts: of each engine: prompt tokens from the cache, answers preempted, drafts accepted.
    """

    answers: int
    hits: Mapping[str, int]
    preemptions: Mapping[str, int]
    drafts: Mapping[str, int]


def asked(config: VLMConfig, adapters: tuple[str | None, ...]) -> list[Request]:
    """Return requests about shared and own pictures, some of which begin alike."""
    rng, found = np.random.default_rng(0), []
    bases = many_devices.prompts(config, 3)
    seen = [rng.integers(0, 256, bases[-1].patches.shape).astype(np.uint8) for _ in range(3)]
    for number in range(24):
        base = bases[number % 3]
        text = base.vision_index < 0
        tokens, patches = base.tokens.copy(), seen[number // 3 % 3][: len(base.patches)]
        changed = np.flatnonzero(text)[-3:] if number % 2 else np.flatnonzero(text)
        tokens[changed] = rng.integers(0, 140, len(changed))
        example = dataclasses.replace(base, tokens=tokens, patches=patches)
        sampling = SamplingParams(**(COMMON | SAMPLINGS[number % len(SAMPLINGS)]), number=number)
        found.append(Request(str(number), example, sampling, adapter=adapters[number % len(adapters)]))
    return found


def tokens_of(events: Iterable[Event], found: dict[Any, list[int]]) -> None:
    """Add the tokens of events to those of each answer."""
    for event in events:
        assert event.error is None, event.error
        if event.token is not None:
            found.setdefault((event.request_id, event.index), []).append(event.token)


def run_mix(engine: Engine, requests: list[Request], rng: random.Random) -> tuple[dict[Any, list[int]], set[str]]:
    """Run requests that come while others run, of which a few are aborted. Returns tokens, and who was aborted."""
    left, aborted, found = list(requests), set(), {}
    while left or engine.has_work:
        if left and (rng.random() < 0.5 or not engine.has_work):
            engine.submit(left.pop())
        running = sorted({request.id for request in requests} & set(engine._active))
        if running and rng.random() < 0.02:
            name = rng.choice(running)
            aborted.add(name)
            engine.abort(name)
        tokens_of(engine.step(), found)
    return found, aborted


def check(family: str, mixes: int, seed: int = 1) -> Mixes:
    """Run mixes on every engine. Raises AssertionError where one gets something else than alone."""
    config = FAMILIES[family]
    model, names = starting_model.random_model(config, 0, None), (None,)
    if family in ADAPTED:
        model = several.stacked(
            model,
            {"cats": random_adapter(model, 1, TARGETS, rank=4), "dogs": random_adapter(model, 2, TARGETS, rank=4)},
        )
        names = (None, "cats", "dogs", "cats", None)
    requests = asked(config, names)
    plain = dataclasses.replace(SIZES, prefix_cache=False, decode_steps=1, ahead=False)
    engine, alone = Engine(model, many_devices.processor(config), plain), {}
    for request in requests:
        for scheduler in engine._schedulers:
            scheduler.forget()
        tokens_of(engine.run([request]), alone)
    hits, preemptions, drafts = {}, {}, {}
    for name, sizes in ENGINES.items():
        engine, rng = Engine(model, many_devices.processor(config), sizes), random.Random(seed)
        for mix in range(mixes):
            chosen = [
                dataclasses.replace(request, id=f"{request.id} {k}")
                for k, request in enumerate(rng.choices(requests, k=rng.randint(2, 9)))
            ]
            found, aborted = run_mix(engine, chosen, rng)
            for (request_id, index), tokens in found.items():
                expected = alone[request_id.split()[0], index]
                if request_id in aborted:
                    expected = expected[: len(tokens)]
                assert tokens == expected, (family, name, mix, request_id, index)
            assert {request_id for request_id, _ in found} | aborted == {request.id for request in chosen}
            stats = engine.stats()
            assert stats.kv_cache_usage_perc == stats.encoder_cache_usage_perc == 0
            assert stats.num_requests_running == stats.num_requests_waiting == 0
        hits[name], preemptions[name] = stats.prefix_cache_hits, stats.num_preemptions
        drafts[name] = stats.spec_decode_num_accepted_tokens
    return Mixes(len({tuple(tokens) for tokens in alone.values()}), hits, preemptions, drafts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", type=int, default=200, help="of each engine of each family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=tuple(FAMILIES))
    arguments = parser.parse_args()
    for number, family in enumerate(arguments.families):
        began = time.perf_counter()
        found = check(family, arguments.mixes, seed=number)
        print(
            f"{family}: {len(ENGINES)} x {arguments.mixes} mixes, {time.perf_counter() - began:.0f} s, {found}",
            flush=True,
        )


if __name__ == "__main__":
    main()
