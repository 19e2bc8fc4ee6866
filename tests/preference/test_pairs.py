"""Preference tasks on a small model with pictures: packed pairs, gradients, reference, denominators."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvlm.adapters import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.example_source import ExampleSource
from jvlm.data.packing import PackedSequences
from jvlm.data.segments import segment_of
from jvlm.models import vlm
from jvlm.preference import log_probs
from jvlm.preference.losses import Answers, PairLossSettings, pair_loss
from jvlm.preference.pairs import PreferenceTask
from jvlm.training.supervised import token_log_probs
from tests.preference.support import moved, write_pairs


@pytest.fixture(scope="module")
def examples(tiny, tmp_path_factory):
    path = write_pairs(tmp_path_factory.mktemp("pairs"), 6)
    config = DataConfig(train=(str(path),), preference="pairs", seq_len=256, max_patches=512)
    source, encode = ExampleSource.of(config), Encode(tiny.processor, config)
    return [one for n in range(6) for one in encode.random_map(source[n], np.random.default_rng(0))]


def batch_of(examples, sequences=None, seq_len=512, max_patches=1024):
    sequences = [examples] if sequences is None else sequences
    return jax.tree.map(jnp.asarray, packing.assemble(sequences, seq_len, max_patches))


@pytest.fixture(scope="module")
def answers(tiny, examples):
    """Log-probabilities of each answer by itself: (chosen, rejected) of the model, of another, and the tokens."""
    models = [{path: v.get_value() for path, v in vlm.variables(tiny.model).items()}, moved(tiny.model)]
    log_probs_of = jax.jit(lambda values, batch: token_log_probs(vlm.bind(tiny.model, values), batch))
    rows = []
    for example in examples:
        for number in (1, 2):
            batch = batch_of([segment_of(example, number)], seq_len=256, max_patches=512)
            sums = [float(np.asarray(log_probs_of(values, batch), np.float64).sum()) for values in models]
            rows.append((*sums, float(log_probs.answer_mask(batch).sum())))
    table = np.asarray(rows).reshape(len(examples), 2, 3)
    return tuple(Answers(*(jnp.asarray(table[:, n, i]) for i in (1, 0, 2))) for n in (0, 1))


KINDS = {
    "mpo": PreferenceTask(("sigmoid", "bco_pair"), (0.8, 0.2), 1.0),
    "simpo": PreferenceTask(("simpo",), sft_weight=1.0, beta=2.0),
    "orpo": PreferenceTask(("orpo",), sft_weight=1.0),
    "aot": PreferenceTask(("aot",)),
}


# without a reference, and a loss of all pairs; what the others make of log-probabilities is in test_losses.py
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("simpo", "aot")]


@pytest.mark.parametrize("name", ["mpo", *SLOW])
def test_packed_pairs_have_the_loss_of_answers_by_themselves(tiny, examples, answers, name):
    task = KINDS[name]
    policy = vlm.bind(tiny.model, moved(tiny.model))
    batch = batch_of(examples, [examples[:3], examples[3:]], 384, 768)
    reference = tiny.model if task.compares else None
    loss = jax.jit(lambda: task.loss(policy, batch, reference=reference))()
    chosen, rejected = answers
    settings = PairLossSettings(task.beta, gamma=task.gamma)
    if name == "aot":
        difference, before = np.sort(chosen.policy - rejected.policy), np.sort(chosen.reference - rejected.reference)
        expected = np.log1p(np.exp(-task.beta * (difference - before))).mean()
    else:
        weights = task.loss_weights or (1.0,)
        expected = sum(
            w * float(pair_loss(kind, chosen, rejected, settings).mean())
            for kind, w in zip(task.losses, weights, strict=True)
        )
    expected += task.sft_weight * -float(chosen.policy.sum() / chosen.tokens.sum())
    assert float(loss.total / loss.weight) == pytest.approx(expected, abs=1e-5)
    assert float(loss.weight) == len(examples)
    if name == "mpo":
        margins = task.beta * np.asarray(chosen.ratio - rejected.ratio)
        assert float(loss.metrics["rewards/margins"].sum) == pytest.approx(margins.sum(), abs=1e-4)
        assert float(loss.metrics["rewards/accuracies"].sum) == (margins > 0).sum()


def unit(tree):
    """Return arrays divided by the norm of them all."""
    norm = np.sqrt(sum(np.square(x).sum() for x in tree.values()))
    return {path: x / norm for path, x in tree.items()}


@pytest.mark.slow
def test_the_gradient_is_that_of_differences_of_the_loss(tiny, examples):
    """Along a random direction and the gradient itself, of unit length each: along the first alone the loss moves by
    little more than float32 rounds it."""
    task, batch = KINDS["mpo"], batch_of(examples[:2], seq_len=320, max_patches=512)
    values = moved(tiny.model)
    rng = np.random.default_rng(2)

    @jax.jit
    def loss(values):
        found = task.loss(vlm.bind(tiny.model, values), batch, reference=tiny.model)
        return found.total / found.weight

    gradient = jax.jit(jax.grad(loss))(values)
    for tower in vlm.TOWERS:
        drawn = unit({path: rng.standard_normal(v.shape) * path.startswith(tower) for path, v in values.items()})
        own = unit({path: np.asarray(g, np.float64) * path.startswith(tower) for path, g in gradient.items()})
        direction = {path: jnp.asarray(drawn[path] + own[path], v.dtype) for path, v in values.items()}
        norm = float(jnp.sqrt(sum(jnp.square(d).sum() for d in direction.values())))
        slope = sum(
            float(np.vdot(np.asarray(gradient[p], np.float64), np.asarray(direction[p], np.float64))) for p in values
        )
        step = 3e-2 / norm
        ends = [float(loss({p: v + s * step * direction[p] for p, v in values.items()})) for s in (-2, -1, 1, 2)]
        measured = (8 * (ends[2] - ends[1]) - (ends[3] - ends[0])) / (12 * step)
        assert slope == pytest.approx(measured, rel=2e-2, abs=2e-4), tower


@pytest.mark.parametrize("reference", [pytest.param("copy", marks=pytest.mark.slow), "adapter_off"])
def test_the_first_loss_is_that_of_a_coin_and_the_pictures_are_encoded_once(tiny, examples, reference):
    model = attach.attach(tiny.model, AdapterConfig(rank=2, targets=("decoder.attention", "decoder.mlp"), dropout=0.5))
    task = PreferenceTask(reference=reference)
    batch = batch_of(examples[:2], seq_len=256, max_patches=512)
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}
    own = {path: value for path, value in values.items() if ".adapter." in path}
    frozen = {path: value for path, value in values.items() if path not in own}

    def loss(own):
        policy = vlm.bind(model, {**frozen, **own})
        copy = vlm.bind(model, {**frozen, **jax.lax.stop_gradient(own)}) if task.needs_reference else None
        found = task.loss(policy, batch, reference=copy)
        return found.total / found.weight

    assert float(jax.jit(loss)(own)) == pytest.approx(np.log(2), abs=1e-5)
    gradient = jax.jit(jax.grad(loss))(own)
    assert max(float(jnp.abs(g).max()) for g in gradient.values()) > 1e-6
    calls = []
    original = vlm.VLM.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm.VLM, "encode", lambda self, batch: calls.append(1) or original(self, batch))
        jax.eval_shape(lambda own: loss(own), own)
    assert len(calls) == 1


@pytest.mark.slow
def test_micro_batches_have_the_loss_of_one_batch(tiny, examples):
    """Pairs and tokens have denominators of their own, and the parts are of unequal size."""
    task, values = KINDS["mpo"], moved(tiny.model)
    sequences = [examples[:1], examples[1:4]]

    @jax.jit
    def loss(values, batch, denominators):
        policy = vlm.bind(tiny.model, values)
        return task.loss(policy, batch, reference=tiny.model, denominators=denominators)

    parts = [batch_of(None, [sequence], 384, 768) for sequence in sequences]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    of_step = [loss(values, part, task.denominators(stacked)) for part in parts]
    of_part = [loss(values, part, task.denominators(jax.tree.map(lambda x: x[None], part))) for part in parts]
    both = batch_of(None, sequences, 384, 768)
    whole = loss(values, both, task.denominators(jax.tree.map(lambda x: x[None], both)))
    together = sum(float(one.total) for one in of_step) / sum(float(one.weight) for one in of_step)
    assert together == pytest.approx(float(whole.total / whole.weight), abs=1e-5)
    apart = np.mean([float(one.total / one.weight) for one in of_part])
    assert abs(apart - together) > 1e-3


@pytest.mark.slow
def test_an_empty_batch_weighs_nothing_and_has_finite_gradients(tiny):
    values = tiny.processor.image_processor.patch_values
    batch = jax.tree.map(jnp.asarray, packing.assemble([[]], 64, 64, patch_values=values, position_values=2))
    values = {path: v.get_value() for path, v in vlm.variables(tiny.model).items()}
    gradient = jax.jit(jax.grad(lambda v: KINDS["orpo"].loss(vlm.bind(tiny.model, v), batch).total))(values)
    assert all(bool(jnp.isfinite(g).all()) for g in gradient.values())


def test_sequences_without_examples_have_shapes_of_their_own_alone():
    assert PackedSequences(None, 0, ()).values == ()
    assert dataclasses.replace(PreferenceTask(), reference="adapter_off").needs_reference is False
