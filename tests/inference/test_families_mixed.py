"""Every kind of vision input gets beside others what it gets alone: with chunks, several answers and few pages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Request, SamplingParams
from jvlm.training import starting_model
from tests.inference import many_devices

CONFIG = EngineConfig(max_slots=6, prefill_tokens=(32, 64), encode_patches=(256,), num_pages=40)


def collected(engine, requests):
    found: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    for event in engine.run(requests):
        tokens, values = found.setdefault((event.request_id, event.index), ([], []))
        tokens.append(event.token)
        values.append(event.logprob.logprob)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idefics2", "mm1_5"])  # the others are in test_random_mixes.py
def test_mixed_requests_get_what_each_gets_alone(name):
    config = many_devices.MODELS[name]
    model = starting_model.random_model(config, 0, None)
    common = {"max_tokens": 9, "stop_token_ids": (), "logprobs": 0}
    kinds = [{}, {"temperature": 1.0, "n": 2}, {"temperature": 0.8, "top_k": 30}, {"repetition_penalty": 1.3}, {}]
    examples = many_devices.prompts(config, 3)
    asked = [
        Request(str(i), examples[i % 3], SamplingParams(**common, **fields, number=i)) for i, fields in enumerate(kinds)
    ]
    alone = {}
    engine = Engine(model, many_devices.processor(config), dataclasses.replace(CONFIG, prefix_cache=False))
    for request in asked:
        alone |= collected(engine, [request])
    for few in (CONFIG, dataclasses.replace(CONFIG, num_pages=16), dataclasses.replace(CONFIG, ahead=True)):
        engine = Engine(model, many_devices.processor(config), few)
        found = collected(engine, asked)
        assert found.keys() == alone.keys()
        for key, (tokens, values) in alone.items():
            assert found[key][0] == tokens, (key, few)
            np.testing.assert_allclose(found[key][1], values, atol=1e-4)
        assert engine.stats().kv_cache_usage_perc == 0
