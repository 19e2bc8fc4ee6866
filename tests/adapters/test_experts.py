"""LoRA on the experts of a mixture: the same as experts with the products added to them, in values and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvlm
from jvlm.adapters import several, targets
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.base_matrices import adapter_path
from jvlm.adapters.config import AdapterConfig
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.decoders.moe import MoEConfig
from jvlm.training import runs, starting_model
from jvlm.training.config import AdaptConfig, ExportConfig
from jvlm.training.supervised import supervised_loss
from tests import quick
from tests.parallel import models
from tests.training import support

CONFIG = models.mm1_5()
ADAPTER = AdapterConfig(rank=3, alpha=6.0, targets=("decoder",), rank_pattern=((r".*mlp\.gate\.2", 5),))
EXPERTS = tuple(f"decoder.blocks.layer.pattern.1.mlp.{name}" for name in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def adapted():
    """(base, the same with adapters that are not zero)."""
    base = quick.random_model(CONFIG)
    weights = extract(attach(base, ADAPTER, seed=1))
    rng = np.random.default_rng(0)
    trained = {
        target: dataclasses.replace(low, b=rng.standard_normal(low.b.shape).astype(np.float32) / 4)
        for target, low in weights.low_rank.items()
    }
    return base, attach(base, dataclasses.replace(weights, low_rank=trained))


def merged_values(base, weights):
    """Parameters with scale * a b added to each matrix, in float64."""
    values = {path: np.array(v.get_value()) for path, v in vlm.parameters(base).items()}
    for target, low in weights.low_rank.items():
        added = low.scale * low.a.astype(np.float64) @ low.b.astype(np.float64)
        values[target.path][target.index] = values[target.path][target.index] + added
    return {path: jnp.asarray(value) for path, value in values.items()}


def test_every_expert_of_every_layer_has_an_adapter_of_its_own_with_its_own_rank(adapted):
    _, model = adapted
    on_experts = {t: low for t, low in extract(model).low_rank.items() if t.path in EXPERTS}
    assert {(t.path, t.index) for t in on_experts} == {(path, (0, expert)) for path in EXPERTS for expert in range(4)}
    assert {low.rank for t, low in on_experts.items() if t.path.endswith("gate") and t.index[1] == 2} == {5}
    assert sum(low.rank == 3 for low in on_experts.values()) == 11
    assert all(low.scale == pytest.approx(6.0 / low.rank) for low in on_experts.values())


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_loss_and_gradients_are_those_of_experts_with_the_products_added(adapted, capacity):
    """d loss / d a = scale * G b^T and d loss / d b = scale * a^T G, with G the gradient of the whole matrix."""
    base, model = adapted
    mlp = dataclasses.replace(CONFIG.decoder.mlp, capacity_factor=capacity)
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, mlp=mlp))
    plain = vlm.bind(vlm.abstract(config), {p: v.get_value() for p, v in vlm.parameters(base).items()})
    weights, batch = extract(model), models.batch(CONFIG)
    model = attach(plain, weights)

    def value_and_gradients(model, values, chosen):
        def loss(chosen):
            found = supervised_loss(vlm.bind(model, {**values, **chosen}), batch)
            return found.total / found.weight

        return jax.jit(jax.value_and_grad(loss))({path: values[path] for path in chosen})

    expected, whole = value_and_gradients(plain, merged_values(base, weights), EXPERTS)
    parts = [f"{adapter_path(path)}.{part}" for path in EXPERTS for part in ("a", "b")]
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}
    found, gradients = value_and_gradients(model, values, parts)
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    largest = 0.0
    for target, low in weights.low_rank.items():
        if target.path not in EXPERTS:
            continue
        G = np.asarray(whole[target.path])[target.index].astype(np.float64)
        of_a, of_b = (np.asarray(gradients[f"{adapter_path(target.path)}.{part}"])[target.index] for part in "ab")
        np.testing.assert_allclose(of_a[:, : low.rank], low.scale * G @ low.b.T, atol=2e-6, err_msg=f"{target} a")
        np.testing.assert_allclose(of_b[: low.rank], low.scale * low.a.T @ G, atol=2e-6, err_msg=f"{target} b")
        assert not of_a[:, low.rank :].any()
        largest = max(largest, abs(G).max())
    assert largest > 1e-4


@pytest.mark.parametrize("capacity", [None, 8.0])
def test_each_sequence_has_the_experts_of_its_adapter_and_the_bits_of_the_base_without_one(adapted, capacity):
    base, model = adapted
    mlp = dataclasses.replace(CONFIG.decoder.mlp, capacity_factor=capacity)  # 8 drops nothing
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, mlp=mlp))
    base = vlm.bind(vlm.abstract(config), {p: v.get_value() for p, v in vlm.parameters(base).items()})
    one, rng = extract(model), np.random.default_rng(1)
    fewer = {t: low for t, low in one.low_rank.items() if t.path != EXPERTS[2] and t.index != (0, 1)}
    other = {t: dataclasses.replace(low, b=rng.standard_normal(low.b.shape) / 4) for t, low in fewer.items()}
    given = {"one": one, "two": dataclasses.replace(one, low_rank=other)}
    both, batch = several.stacked(base, given), models.batch(CONFIG)
    names = [(None, "two", "one")[row % 3] for row in range(len(batch.tokens))]

    with several.choosing(jnp.asarray(several.numbers(both.adapters, names))):
        found = quick.logits(both, batch)
    alone = {name: quick.logits(attach(base, weights), batch) for name, weights in given.items()}
    alone[None] = quick.logits(base, batch)
    for row, name in enumerate(names):
        if name is None:
            np.testing.assert_array_equal(found[row], alone[None][row])
        else:
            np.testing.assert_allclose(found[row], alone[name][row], atol=2e-5)
            assert np.abs(found[row] - alone[None][row]).max() > 0.1
    np.testing.assert_array_equal(quick.logits(both, batch), alone[None])


def test_room_for_experts_takes_what_is_loaded_later_and_a_plan_counts_it(adapted):
    base, model = adapted
    weights, batch = extract(model), models.batch(CONFIG)
    room = several.AdapterRoom.of_model(6, towers=False, experts=True)
    empty, full = (several.stacked(base, entries, room) for entries in ([None] * 2, [None, ("one", weights)]))

    def shapes(model):
        return {path: (v.get_value().shape, v.get_metadata()["axes"]) for path, v in vlm.variables(model).items()}

    # what compiled for empty places runs on full ones, and is what was planned from shapes
    assert shapes(empty) == shapes(full) == shapes(several.structure(vlm.abstract(CONFIG), 2, room))
    index = jnp.asarray(several.numbers(full.adapters, [(None, "one")[row % 2] for row in range(len(batch.tokens))]))
    with several.choosing(index):
        found = [quick.logits(one, batch) for one in (empty, full)]
    alone = [quick.logits(one, batch) for one in (base, model)]
    for row in range(len(index)):
        np.testing.assert_array_equal(found[0][row], alone[0][row])
        np.testing.assert_allclose(found[1][row], alone[row % 2][row], atol=2e-5)
        assert row % 2 == 0 or np.abs(found[1][row] - alone[0][row]).max() > 0.1
    with pytest.raises(UserError, match=r"mlp\.(gate|up|down), and room is kept for decoder.*--enable_expert_lora"):
        several.stacked(base, {"one": weights}, several.AdapterRoom.of_model(6, towers=True))
    with pytest.raises(UserError, match="rank 5, and room is kept for rank 4"):
        several.stacked(base, {"one": weights}, several.AdapterRoom.of_model(4, towers=True, experts=True))


def test_what_experts_cannot_have_is_refused():
    for changes in ({"use_dora": True}, {"dropout": 0.1}, {"lora_bias": True}, {"init": "pissa"}):
        with pytest.raises(UserError, match="experts"):
            targets.resolve(dataclasses.replace(ADAPTER, **changes), CONFIG)


@pytest.mark.slow
def test_experts_made_from_a_dense_model_are_trained_by_adapters_and_the_run_loads(tmp_path):
    """No checkpoint has tensors for these experts, so they go by the paths of their parameters."""
    options = ("--optimizer.learning_rate", "1e-3")
    examples = support.write_examples(tmp_path / "data", 12)
    jvlm.save(*starting_model.start_model(support.experiment(tmp_path, examples, *options)), tmp_path / "base")
    experts = MoEConfig(every=2, experts=4, top_k=2, intermediate_size=48)
    experiment = support.experiment(
        tmp_path,
        examples,
        *options,
        init_from=str(tmp_path / "base"),
        adapt=AdaptConfig(experts=experts),
        adapter=AdapterConfig(rank=2, targets=("decoder",)),
        export=ExportConfig(enabled=False),
        steps=3,
    )
    before = extract(starting_model.start_model(experiment)[0]).low_rank
    after = extract(runs.train(experiment).model).low_rank
    loaded = extract(jvlm.load(tmp_path / "run")[0]).low_rank
    assert {t.path for t in after} > set(EXPERTS)
    assert before.keys() == after.keys() == loaded.keys()
    for target, low in after.items():
        np.testing.assert_array_equal(loaded[target].a, low.a)
        np.testing.assert_array_equal(loaded[target].b, low.b)
    moved = {t.path for t, low in after.items() if not np.array_equal(low.b, before[t].b)}
    assert moved == {t.path for t in after}
