"""NEFTune's noise: its bounds against numpy for each conversation, its statistics, and where it is absent."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.training import train_step, trainer
from jvlm.training.neftune import EmbeddingNoise
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask, supervised_loss
from tests import quick
from tests.parallel import models

ALPHA, WIDTH = 5.0, 512


@pytest.fixture(scope="module")
def batch():
    return models.batch(models.qwen2_5_vl())


@pytest.fixture(scope="module")
def noise(batch):
    """Noise on embeddings of zeros."""
    zeros = jnp.zeros((*batch.tokens.shape, WIDTH))
    return np.asarray(EmbeddingNoise(jax.random.key(3), ALPHA).of_text(zeros, batch), np.float64)


def bounds(segment_ids: np.ndarray, width: int) -> np.ndarray:
    """alpha / sqrt(L d) of each token, by counting."""
    found = np.zeros(segment_ids.shape)
    for example, ids in enumerate(segment_ids):
        for segment in set(ids.tolist()) - {0}:
            found[example, ids == segment] = ALPHA / np.sqrt((ids == segment).sum() * width)
    return found


def test_each_conversation_of_a_packed_sequence_has_the_bound_of_its_own_length(batch, noise):
    expected = bounds(batch.segment_ids, WIDTH)
    assert len(np.unique(expected)) > 10
    largest = np.abs(noise).max(-1)
    assert (largest <= expected * (1 + 1e-6)).all()
    assert (largest[expected > 0] > 0.97 * expected[expected > 0]).all()
    assert not noise[batch.segment_ids == 0].any()


def test_within_its_bound_the_noise_is_uniform_and_independent(batch, noise):
    expected = bounds(batch.segment_ids, WIDTH)
    inside = expected > 0
    scaled = noise[inside] / expected[inside][:, None]
    assert stats.kstest(scaled.ravel(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    # between neighbours in either direction
    for one, other in ((scaled[1:], scaled[:-1]), (scaled[:, 1:], scaled[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)


@pytest.mark.parametrize(("where", "text", "merged"), [("text", True, False), ("merged", False, True)])
def test_the_noise_is_added_before_or_after_vision_tokens_are_put_in(batch, where, text, merged):
    change, zeros = EmbeddingNoise(jax.random.key(0), ALPHA, where), jnp.zeros((*batch.tokens.shape, 8))
    assert bool(np.any(change.of_text(zeros, batch))) is text
    assert bool(np.any(change.of_merged(zeros, batch))) is merged


@pytest.fixture(scope="module")
def program(batch):
    """(template, parameters, run(task, step, accumulated) -> metrics) of a model whose last norm is trained."""
    template, values = trainer.split(quick.random_model(models.qwen2_5_vl()))
    tx, last = optax.sgd(0.0), "decoder.norm.scale"
    frozen = {path: value for path, value in values.items() if path != last}
    steps: dict[SupervisedTask, train_step.TrainStep] = {}

    def run(task: SupervisedTask, step: int, count: int = 1) -> dict[str, float]:
        trained = {last: values[last].copy()}
        state = TrainState(jnp.asarray(step), trained, tx.init(trained), frozen)
        compiled = steps.setdefault(task, train_step.TrainStep(template, task, tx, seed=7))
        return jax.tree.map(float, compiled(state, train_step.stack([batch] * count))[1])

    return template, values, run


def test_noise_depends_on_seed_step_and_micro_batch_alone(batch, program):
    template, values, run = program

    @jax.jit
    def loss(rng, alpha):
        found = supervised_loss(vlm.bind(template, values), batch, noise=EmbeddingNoise(rng, alpha)).metrics["loss"]
        return found.sum / found.count

    task = SupervisedTask(neftune_alpha=30.0)
    losses = [run(task, step)["loss"] for step in (0, 1)]
    assert run(task, 1)["loss"] == losses[1], "a step that is run again, after a restart, draws the same"
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 0)
    assert losses[1] == pytest.approx(float(loss(rng, 30.0)), rel=1e-6)
    assert len({round(float(x), 4) for x in (*losses, loss(rng, 0.0))}) == 3


def test_evaluation_draws_nothing(batch, program):
    template, values, _ = program
    one = jax.tree.map(lambda x: x[None], batch)
    texts = [
        str(jax.make_jaxpr(train_step.make_eval_step(template, task))(values, {"frozen": {}, "reference": None}, one))
        for task in (SupervisedTask(), SupervisedTask(neftune_alpha=30.0))
    ]
    assert texts[0] == texts[1]
    assert "random" not in texts[0]


def test_a_scale_of_zero_leaves_the_hidden_states_bit_equal(batch, program):
    template, values, _ = program
    model = vlm.bind(template, values)
    silent = EmbeddingNoise(jax.random.key(0), 0.0, "merged")
    plain, changed = (quick.call(lambda m, b, n=noise: m.hidden(b, n).hidden, model, batch) for noise in (None, silent))
    np.testing.assert_array_equal(plain, changed)


@pytest.mark.slow
def test_accumulated_micro_batches_draw_noise_of_their_own(program):
    _, _, run = program
    task = SupervisedTask(neftune_alpha=30.0, neftune_where="merged")
    assert run(task, 0, 2)["loss"] != run(task, 0, 1)["loss"]


def test_a_scale_below_zero_or_an_unknown_place_is_refused():
    with pytest.raises(UserError, match=r"task.neftune_alpha must be at least 0, got -1"):
        SupervisedTask(neftune_alpha=-1.0)
    with pytest.raises(UserError, match=r"task.neftune_where must be one of 'text', 'merged', got 'image'"):
        dataclasses.replace(SupervisedTask(), neftune_where="image")
