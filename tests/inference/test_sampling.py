"""Filters against transformers' logits processors; draws against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jvlm.errors import UserError
from jvlm.inference import sampling
from jvlm.inference.sampling import SamplingArrays, SamplingConfig

B, V = 3, 400
NONE_BANNED = np.zeros(V, bool)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 4, (B, V)).astype(np.float32)


def adjusted(logits, prompt=None, **config):
    config = SamplingConfig(**config)
    seen = None
    if prompt is not None:
        seen = np.zeros(logits.shape, bool)
        np.put_along_axis(seen, prompt, True, axis=1)
        seen = jnp.asarray(seen)
    arrays = SamplingArrays.of(config, np.arange(len(logits)))
    return np.asarray(sampling.adjust(jnp.asarray(logits), config.flags, arrays, banned=NONE_BANNED, seen_tokens=seen))


def processed(logits, *processors, prompt=None):
    ids = torch.zeros((len(logits), 0), dtype=torch.long) if prompt is None else torch.from_numpy(prompt)
    return LogitsProcessorList(processors)(ids, torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(logits, penalty):
    prompt = np.random.default_rng(1).integers(0, V, (B, 50))
    expected = processed(logits, RepetitionPenaltyLogitsProcessor(penalty), prompt=prompt)
    np.testing.assert_allclose(adjusted(logits, prompt, repetition_penalty=penalty), expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 50, V, V + 5])
def test_top_k_equals_transformers(logits, k):
    np.testing.assert_array_equal(adjusted(logits, temperature=1.0, top_k=k), processed(logits, TopKLogitsWarper(k)))


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(logits, p, scale):
    flat = logits * np.float32(scale)
    np.testing.assert_array_equal(adjusted(flat, temperature=1.0, top_p=p), processed(flat, TopPLogitsWarper(p)))


def test_all_filters_together_run_in_the_order_of_transformers(logits):
    prompt = np.random.default_rng(1).integers(0, V, (B, 50))
    expected = processed(
        logits,
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(30),
        TopPLogitsWarper(0.8),
        prompt=prompt,
    )
    found = adjusted(logits, prompt, repetition_penalty=1.2, temperature=0.7, top_k=30, top_p=0.8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_top_k_keeps_ties_with_the_last_one_kept_as_transformers_does():
    tied = np.array([[3.0, 2.0, 2.0, 2.0, -1.0] + [-5.0] * (V - 5)], np.float32)
    np.testing.assert_array_equal(adjusted(tied, temperature=1.0, top_k=2), processed(tied, TopKLogitsWarper(2)))


def draw(logits, request_ids, step=0, banned=NONE_BANNED, **config):
    config = SamplingConfig(**({"temperature": 1.0} | config))
    arrays = SamplingArrays.of(config, np.asarray(request_ids))
    return np.asarray(sampling.sample(jnp.asarray(logits), config.flags, arrays, jnp.int32(step), banned=banned))


def test_draws_follow_the_probabilities():
    logits = np.random.default_rng(0).normal(0, 1, V).astype(np.float32)
    count = 40_000
    tokens = draw(np.broadcast_to(logits, (count, V)), range(count), temperature=0.8)
    expected = count * np.asarray(jax.nn.softmax(logits / 0.8))
    chi_squared = ((np.bincount(tokens, minlength=V) - expected) ** 2 / expected).sum()
    # V - 1 degrees of freedom: mean V - 1, variance 2 (V - 1); five standard deviations
    assert chi_squared < V - 1 + 5 * np.sqrt(2 * (V - 1))


def test_a_draw_depends_on_seed_number_and_step_and_not_on_the_batch(logits):
    flat = logits[:1] * 0
    many = draw(np.repeat(flat, 16, 0), range(16))
    alone = [int(draw(flat, [n])[0]) for n in range(16)]
    assert many.tolist() == alone
    assert len(set(alone)) > 8
    assert draw(flat, [3], step=1) != draw(flat, [3], step=2)
    assert draw(np.repeat(flat, 16, 0), range(16), seed=1).tolist() != alone


@pytest.mark.parametrize("config", [{"temperature": 0.0}, {"temperature": 100.0}, {"temperature": 100.0, "top_p": 0.9}])
def test_banned_tokens_are_never_chosen_even_if_likeliest(config):
    banned = np.zeros(V, bool)
    banned[5:] = True
    logits = np.where(banned, 10.0, 0.0).astype(np.float32)
    assert draw(np.broadcast_to(logits, (500, V)), range(500), banned=banned, **config).max() < 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"sampling\.{field} is {value}"):
        SamplingConfig(**{field: value})
