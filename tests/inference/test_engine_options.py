"""Options of the engine: memory, the cache's dtype, determinism; and faults behind asyncio."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import jax
import numpy as np
import psutil
import pytest

from jvlm.errors import UserError
from jvlm.inference import memory, shapes
from jvlm.inference.async_engine import AsyncEngine, EngineDead
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Event, Request, SamplingParams, StepFailed
from jvlm.training import starting_model
from tests.inference import many_devices

SIZES = EngineConfig(
    max_slots=4,
    max_model_len=96,
    prefill_tokens=(64,),
    encode_patches=(128,),
    feature_slots=64,
    decode_slots=(4,),
)


def tokens_of(engine, asked):
    found: dict[str, list[int]] = {}
    for event in engine.run(asked):
        assert event.error is None, event.error
        found.setdefault(event.request_id, []).append(event.token)
    return found


def asked(config, **sampling):
    params = SamplingParams(**({"max_tokens": 12, "stop_token_ids": (), "detokenize": False} | sampling))
    return [Request(str(i), example, params) for i, example in enumerate(many_devices.prompts(config, 3))]


def test_the_pool_holds_the_longest_answers_in_all_slots_whatever_comes_first():
    sizes = dataclasses.replace(SIZES, max_slots=32, max_model_len=400)
    options = {"groups": 1, "page_size": 16, "patch_step": 16, "tokens_per_image": None, "prefills_whole": False}
    options["reads_used_pages"] = True
    few, many = (
        shapes.shapes_for(sizes, [shapes.Need(9, tokens, 1, 0, 0, 0)] * count, least=None, **options)
        for tokens, count in ((12, 1), (400, 64))
    )
    assert few == many
    assert few.pages > 32 * 400 // 16


@dataclasses.dataclass
class Chip:
    """A device that says how much memory it has."""

    limit: int | None
    used: int
    platform: str = "gpu"

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit, "bytes_in_use": self.used}


def test_free_memory_is_that_of_the_fullest_device_and_unknown_where_one_does_not_say():
    assert memory.free_bytes([Chip(1000, 100), Chip(1000, 300)], 0.8) == 500
    assert memory.free_bytes([Chip(1000, 100), Chip(None, 0)], 0.8) is None


def test_a_share_of_memory_is_that_of_the_configuration_or_of_accelerators():
    cpu, says, silent = [Chip(None, 0, "cpu")], [Chip(1000, 0)], [Chip(None, 0)]
    assert [memory.share(devices, None) for devices in (cpu, says, silent)] == [None, 0.9, None]
    assert [memory.share(devices, 0.5) for devices in (cpu, says)] == [0.5, 0.5]
    with pytest.raises(UserError, match=r"0\.5, and .* does not say"):
        memory.share(silent, 0.5)
    half = memory.free_bytes(2 * cpu, 1)
    assert half == pytest.approx((psutil.virtual_memory().total - psutil.Process().memory_info().rss) / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0.4, 1e6])
def test_as_many_pages_as_fit_and_no_more_than_the_slots_need(monkeypatch, spare):
    config = many_devices.MODELS["qwen2_5_vl"]
    model = starting_model.random_model(config, 0, None)
    whole = Engine(model, many_devices.processor(config), SIZES)
    whole.warm_up()
    cache = jax.tree.leaves(whole._device.pages())
    page = sum(x.nbytes for x in cache) // whole.shapes.pages
    width = -(-SIZES.max_model_len // 16)
    needed = SIZES.max_slots * (width + 1) + width + 2  # by answers of the greatest length in all slots
    free = int(spare * page * needed)
    temporary = []

    def measured(state):
        temporary.append(taken(state))
        return temporary[-1]

    taken = memory.temporary_bytes
    monkeypatch.setattr(memory, "temporary_bytes", measured)
    # what is free beside the temporary memory of the largest program, and the pages that are there already
    monkeypatch.setattr(memory, "free_bytes", lambda devices, fraction: free + (temporary[-1] if temporary else 0))
    sizes = dataclasses.replace(SIZES, memory_fraction=0.9)
    engine = Engine(model, many_devices.processor(config), sizes)
    assert engine.size_cache() <= needed
    engine.warm_up()
    assert len(temporary) == 1
    assert temporary[0] > 0
    assert engine.shapes.pages <= min(needed, width + 2 + free // page)
    assert (engine.shapes.pages < needed) == (spare < 1)
    assert tokens_of(engine, asked(config)) == tokens_of(whole, asked(config))
    assert engine.stats().compilations_after_ready == 0


@pytest.mark.slow
def test_a_narrow_cache_takes_a_quarter_of_the_memory_and_few_answers_change():
    config = many_devices.MODELS["qwen2_5_vl"]
    model, found, bytes_of = starting_model.random_model(config, 0, None), {}, {}
    for dtype in (None, "bfloat16", "float8_e4m3fn"):
        engine = Engine(model, many_devices.processor(config), dataclasses.replace(SIZES, kv_cache_dtype=dtype))
        found[dtype] = tokens_of(engine, asked(config))
        bytes_of[dtype] = sum(x.nbytes for x in jax.tree.leaves(engine._device.pages()))
    assert bytes_of[None] == 2 * bytes_of["bfloat16"] == 4 * bytes_of["float8_e4m3fn"]
    same = np.mean([a == b for n in found[None] for a, b in zip(found[None][n], found["bfloat16"][n], strict=True)])
    assert same > 0.9
    first = [found[None][n][0] == found["float8_e4m3fn"][n][0] for n in found[None]]
    assert all(first)  # the first token is of the prompt, which a prefill does not read back


@pytest.mark.slow
def test_a_deterministic_engine_answers_in_every_mix_as_alone_in_bfloat16():
    config = many_devices.MODELS["qwen2_5_vl"]
    config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, compute_dtype="bfloat16"))
    model = starting_model.random_model(config, 0, None)
    engine = Engine(model, many_devices.processor(config), dataclasses.replace(SIZES, deterministic=True))
    requests = asked(config, temperature=1.5, max_tokens=24, logprobs=0)
    expected, rng = {}, random.Random(0)
    for request in requests:
        expected |= {request.id: [(e.token, e.logprob.logprob) for e in engine.run([request])]}
    for _ in range(6):
        mixed = [dataclasses.replace(r, id=f"{r.id} {k}") for r in requests for k in range(rng.randint(0, 2))]
        rng.shuffle(mixed)
        found: dict[str, list] = {}
        for event in engine.run(mixed):
            found.setdefault(event.request_id, []).append((event.token, event.logprob.logprob))
        assert found == {r.id: expected[r.id.split()[0]] for r in mixed}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_fraction": 0}, "memory_fraction is 0"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype is 'int3'"),
        ({"deterministic": True, "draft_tokens": 2}, "exclude each other"),
        ({"tpot_goal": 0}, "tpot_goal is 0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        EngineConfig(**fields)


class Failing:
    """An engine whose first step ends its request with an error, for good or not."""

    def __init__(self, failure):
        self.failure, self._later, self._asked = None, failure, []

    @property
    def has_work(self):
        return bool(self._asked)

    def submit(self, request):
        self._asked.append(request.id)

    def abort(self, request_id):
        pass

    def step(self):
        self.failure = self._later
        return [Event(self._asked.pop(), finish_reason="error", error=StepFailed("the device failed"))]

    def stats(self):
        return None


@pytest.mark.parametrize("failure", [None, "the parameters are lost"])
def test_a_failed_step_reaches_its_caller_and_a_lasting_failure_ends_the_thread(failure, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    example = many_devices.prompts(many_devices.MODELS["qwen2_5_vl"], 1)[0]

    async def run():
        engine = AsyncEngine(Failing(failure))
        engine.start()
        with pytest.raises(StepFailed, match="the device failed"):
            await engine.submit(Request("a", example)).events()
        for _ in range(200):
            if engine.dead or failure is None:
                break
            await asyncio.sleep(0.01)
        assert engine.dead == (failure is not None)
        if failure is not None:
            with pytest.raises(EngineDead):
                engine.submit(Request("b", example))
        await engine.close()

    asyncio.run(run())
