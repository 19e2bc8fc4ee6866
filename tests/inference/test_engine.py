"""What is compiled, what is copied, and what is shared."""

import jax
import numpy as np
import pytest
from flax import nnx

from jvlm.data import packing
from jvlm.inference.engine import TOKEN_STEP, Engine
from jvlm.inference.sampling import SamplingArrays, SamplingConfig
from tests.inference.support import prompt
from tests.support import picture


def encode(tiny, text, *images):
    return tiny.processor.encode(prompt(text, images=list(images)), generation_prompt=True)


def run(engine, examples, **settings):
    return list(engine.steps(examples, SamplingConfig(**({"max_new_tokens": 6, "stop_token_ids": ()} | settings))))


@pytest.fixture
def engine(tiny):
    """One that has compiled nothing yet."""
    return Engine(tiny.model, tiny.processor)


@pytest.fixture(scope="module")
def shared_engine(tiny):
    return Engine(tiny.model, tiny.processor)


def test_prompts_of_one_bucket_share_one_prefill_and_one_decode_step(tiny, engine):
    first = [encode(tiny, "<image>what is it?", picture(112, 84)), encode(tiny, "the answer is yes")]
    second = [encode(tiny, "<image>where is it?", picture(84, 112)), encode(tiny, "three"), encode(tiny, "no, two")]
    run(engine, first * 2)
    run(engine, second)
    assert engine.compilations == {"prefill": 1, "decode": 1}


def test_sampling_numbers_compile_nothing(tiny, engine):
    examples = [encode(tiny, "what is the answer?")]
    for temperature, top_k, top_p, seed in ((1.0, 5, 1.0, 0), (0.5, 0, 0.9, 1), (2.0, 50, 0.1, 2)):
        run(engine, examples, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert engine.compilations == {"prefill": 1, "decode": 1}


def test_finished_examples_fall_silent_and_the_last_one_ends_the_loop(tiny, shared_engine):
    examples = [encode(tiny, "what is the answer?"), encode(tiny, "where is the cat?")]
    free = run(shared_engine, examples, max_new_tokens=12)
    stop = free[2][0]
    last = next((i for i, (_, token) in enumerate(free) if token == stop), 11)
    steps = run(shared_engine, examples, max_new_tokens=12, stop_token_ids=(stop,))
    first = next(i for i, (token, _) in enumerate(free) if token == stop)
    assert [a for a, _ in steps[: first + 1]] == [a for a, _ in free[: first + 1]]
    assert all(a is None for a, _ in steps[first + 1 :])
    assert len(steps) == max(first, last) + 1


@pytest.mark.parametrize("settings", [{}, {"max_new_tokens": 1}, {"temperature": 1.0, "repetition_penalty": 1.2}])
def test_running_ahead_of_the_host_changes_no_token(tiny, shared_engine, monkeypatch, settings):
    examples = [encode(tiny, "what is the answer?"), encode(tiny, "<image>is it red?", picture(140, 84))]
    behind = run(shared_engine, examples, **settings)
    monkeypatch.setattr(shared_engine, "ahead", True)
    assert run(shared_engine, examples, **settings) == behind


def pointers(arrays):
    return {(a.unsafe_buffer_pointer(), a.unsafe_buffer_pointer() + a.nbytes) for a in arrays}


def test_decoding_shares_the_memory_of_the_models_parameters(tiny, shared_engine):
    owned = pointers(shared_engine._given)
    for begin, end in pointers(shared_engine._decoder_leaves):
        assert any(low <= begin and end <= high for low, high in owned)
    assert len(shared_engine._decoder_leaves) > len(jax.tree.leaves(nnx.state(tiny.model.decoder)))


def test_parameters_released_are_taken_again_by_update_and_compile_nothing(tiny, shared_engine):
    examples = [encode(tiny, "what is the answer?")]
    before, compiled = run(shared_engine, examples), shared_engine.compilations
    shared_engine.release()
    shared_engine.update(tiny.model)
    assert run(shared_engine, examples) == before
    assert shared_engine.compilations == compiled


@pytest.mark.parametrize(("examples", "settings"), [(1, {}), (4, {"temperature": 1.0})], ids=["greedy", "sampled"])
def test_a_decode_step_copies_neither_the_cache_nor_a_weight(tiny, shared_engine, examples, settings):
    config = SamplingConfig(max_new_tokens=2000, **settings)
    batch, lengths = shared_engine._batch([encode(tiny, "what is the answer?")] * examples, examples)
    arrays = SamplingArrays.of(config, np.arange(examples))
    cache_len = packing.bucket(int(lengths.max()) + config.max_new_tokens, TOKEN_STEP)
    logits, cache = shared_engine._steps.prefill(shared_engine._leaves, batch, lengths)
    leaves = shared_engine._decoder_leaves
    token, state = shared_engine._steps.first_token(
        config.flags, cache_len, leaves, logits, cache, batch, lengths, arrays
    )
    lowered = shared_engine._steps.decode.lower(config.flags, leaves, state, token, arrays)
    memory = lowered.compile().memory_analysis()
    keys = state.cache[0][0].nbytes
    assert memory.alias_size_in_bytes >= 2 * keys * len(state.cache)
    # attention scores of the new token are the largest thing that a step may make
    scores = 4 * examples * tiny.config["num_attention_heads"] * cache_len
    largest_weight = 4 * tiny.config["hidden_size"] * tiny.config["intermediate_size"]
    assert memory.temp_size_in_bytes < 2 * scores + largest_weight
    assert memory.temp_size_in_bytes < keys
