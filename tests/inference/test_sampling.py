"""Filters against transformers' logits processors; draws against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jvlm.errors import UserError
from jvlm.inference import sampling
from jvlm.inference.requests import Grammar, SamplingParams
from jvlm.inference.sampling import SamplingArrays, SamplingConfig, SlotRules

B, V = 3, 400
NONE_BANNED = np.zeros((2, V), bool)
# as the engine has them, each in one program
SAMPLE, ADJUST = jax.jit(sampling.sample), jax.jit(sampling.adjust)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 4, (B, V)).astype(np.float32)


def arrays_of(count, numbers=None, step=0, **params):
    params = SamplingParams(**params)
    numbers = range(count) if numbers is None else numbers
    return SamplingArrays.of([params] * count, range(count), numbers, [step] * count)


def rules_of(prompt, answers=None):
    seen, counts = np.zeros((len(prompt) + 1, V), bool), np.zeros((len(prompt) + 1, V), np.int32)
    np.put_along_axis(seen[:-1], prompt, True, axis=1)
    for row, answer in enumerate([] if answers is None else answers):
        counts[row] = np.bincount(answer, minlength=V)
    flat = jnp.zeros(seen.shape)
    return SlotRules(flat, jnp.asarray(seen), flat.astype(bool), jnp.asarray(counts))


def adjusted(logits, prompt=None, answers=None, **params):
    arrays = arrays_of(len(logits), **params)
    rules = None if prompt is None else rules_of(prompt, answers)
    return np.asarray(ADJUST(jnp.asarray(logits), arrays, banned=NONE_BANNED, rules=rules))


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


@pytest.mark.parametrize("p", [0.02, 0.3, 1.0])
def test_min_p_equals_transformers(logits, p):
    np.testing.assert_array_equal(adjusted(logits, temperature=1.0, min_p=p), processed(logits, MinPLogitsWarper(p)))


def test_presence_and_frequency_count_the_answer_and_not_the_prompt(logits):
    prompt, answers = np.array([[1], [2], [3]]), [[5, 5, 7], [], [9]]
    found = adjusted(logits, prompt, answers, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.copy()
    expected[0, 5] -= 0.5 + 2 * 0.25
    expected[0, 7] -= 0.75
    expected[2, 9] -= 0.75
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bias_end_tokens_and_a_mask_forbid_and_prefer(logits):
    rules = rules_of(np.zeros((B, 1), np.int64))
    bias = np.zeros((B + 1, V), np.float32)
    bias[0], bias[0, 4], bias[1, 6] = -np.inf, 0, 100
    ends = np.zeros((B + 1, V), bool)
    ends[:, 8] = True
    rules = SlotRules(jnp.asarray(bias), rules.seen, jnp.asarray(ends), rules.counts)
    bits = np.zeros((B, 32 * 13), bool)
    bits[:2], bits[2, 11] = True, True
    mask = (bits.reshape(B, 13, 32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
    logits[:, 8] = 50
    params = [SamplingParams(min_tokens=2)] * 2 + [SamplingParams(min_tokens=2, thinking_budget=1)]
    arrays = SamplingArrays.of(params, range(B), range(B), [0, 0, 0])
    chosen = SAMPLE(jnp.asarray(logits), arrays, banned=NONE_BANNED, rules=rules, mask=mask)
    assert np.asarray(chosen).tolist() == [4, 6, 11]
    later = SamplingArrays.of([SamplingParams(min_tokens=2)] * B, range(B), range(B), [2, 2, 2])
    chosen = SAMPLE(jnp.asarray(logits), later, banned=NONE_BANNED, rules=rules, mask=mask)
    assert np.asarray(chosen).tolist() == [4, 6, 8]


def test_every_row_gets_beside_others_what_it_gets_alone(logits):
    many = np.concatenate([logits, logits + 1])
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=0.5, top_p=0.6),
        SamplingParams(temperature=0.9, min_tokens=4),
        SamplingParams(grammar=Grammar("json_object")),
    ]
    rules, mask = rules_of(np.zeros((6, 1), np.int64)), np.full((6, 13), -1, np.int32)
    together = SamplingArrays.of(params, range(6), range(6), range(6))
    options = {"banned": NONE_BANNED, "rules": rules}
    found = np.asarray(SAMPLE(jnp.asarray(many), together, mask=mask, **options))
    for i, one in enumerate(params):
        alone = SamplingArrays.of([one], [i], [i], [i])
        chosen = SAMPLE(jnp.asarray(many[i : i + 1]), alone, mask=mask[:1], **options)
        assert int(chosen[0]) == found[i]


def test_numbers_packed_into_one_array_are_the_same_behind_it():
    params = [SamplingParams(temperature=0.3, seed=2**32 - 1, top_p=0.25, logprobs=3), SamplingParams()]
    arrays = SamplingArrays.of(params, [4, 5], [6, 7], [8, 9])
    found = SamplingArrays.unpacked(jnp.asarray(arrays.packed()))
    np.testing.assert_array_equal(found.ints, arrays.ints)
    np.testing.assert_array_equal(found.floats, arrays.floats)
    assert np.asarray(found.scored).tolist() == [4, 0]


@pytest.mark.parametrize(("most", "chosen", "top"), [(0, False, False), (1, True, False), (3, True, True)])
def test_log_probabilities_are_computed_as_far_as_somebody_asks(logits, most, chosen, top):
    tokens = jnp.asarray([3, 1, 2])
    every = sampling.logprobs(jnp.asarray(logits), tokens, 2)
    found = sampling.asked_logprobs(jnp.asarray(logits), tokens, 2, jnp.asarray([0, most, 0]))
    for field, wanted in (("chosen", chosen), ("entropy", chosen), ("top", top), ("top_tokens", top)):
        expected = np.asarray(getattr(every, field))
        np.testing.assert_array_equal(getattr(found, field), expected if wanted else 0 * expected)


def test_log_probabilities_and_entropy_are_those_of_the_raw_scores(logits):
    found = sampling.logprobs(jnp.asarray(logits), jnp.asarray([3, 1, 2]), 5)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.chosen, exact[[0, 1, 2], [3, 1, 2]], atol=1e-5)
    order = np.argsort(-exact, axis=-1)[:, :5]
    np.testing.assert_array_equal(found.top_tokens, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(exact, order, 1), atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(exact) * exact).sum(-1), atol=1e-4)


def draw(logits, request_ids, step=0, banned=NONE_BANNED, **params):
    arrays = arrays_of(len(logits), request_ids, step, **({"temperature": 1.0} | params))
    return np.asarray(SAMPLE(jnp.asarray(logits), arrays, banned=banned))


def test_draws_follow_the_probabilities():
    count, words = 40_000, 100
    logits = np.random.default_rng(0).normal(0, 1, words).astype(np.float32)
    banned = NONE_BANNED[:, :words]
    tokens = draw(np.broadcast_to(logits, (count, words)), range(count), banned=banned, temperature=0.8)
    expected = count * np.asarray(jax.nn.softmax(logits / 0.8))
    chi_squared = ((np.bincount(tokens, minlength=words) - expected) ** 2 / expected).sum()
    # words - 1 degrees of freedom: mean words - 1, variance 2 (words - 1); five standard deviations
    assert chi_squared < words - 1 + 5 * np.sqrt(2 * (words - 1))


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
    banned = np.zeros((2, V), bool)
    banned[:, 5:] = True
    logits = np.where(banned[0], 10.0, 0.0).astype(np.float32)
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
