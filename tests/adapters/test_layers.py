"""How adapters begin, what they drop, and stacks whose layers differ."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jvlm import families
from jvlm.adapters import initial, targets
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.base_matrices import adapter_of
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.layers import AdapterConstant, AdapterParam, LowRankAdapter, column_norm, kept
from jvlm.adapters.steps import prepare
from jvlm.errors import UserError
from jvlm.models import vlm
from tests.adapters import golden

SMALL = golden.ROOT / "small" / "inits_and_dora"


@pytest.fixture(scope="module")
def small():
    return load_file(f"{SMALL}.safetensors"), json.loads(SMALL.with_suffix(".json").read_text())


def logits(model, family="qwen2_5_vl"):
    return np.asarray(model(golden.batch(family)))


@pytest.mark.parametrize(("case", "make"), [("pissa", initial.pissa), ("olora", initial.olora)])
def test_parts_of_the_base_are_those_that_peft_takes(small, case, make):
    arrays, facts = small
    scale = facts[case]["scaling"]
    a, b = make(arrays["W"].T.astype(np.float64), 2, scale)
    np.testing.assert_allclose((scale * a @ b).T, arrays[f"{case}.BA"], atol=2e-5)
    np.testing.assert_allclose(arrays["W"] - (scale * a @ b).T, arrays[f"{case}.W_base"], atol=2e-5)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
def test_new_adapters_change_no_answer_and_pissa_is_exported_as_plain_lora(init):
    base = golden.base("qwen2_5_vl")
    config = AdapterConfig(rank=3, alpha=6.0, init=init, rank_pattern=(("q_proj", 2),))
    model = attach(base, config, seed=3)
    np.testing.assert_allclose(logits(model), logits(base), atol=2e-5)
    assert all(
        model_value is v.get_value()
        for model_value, v in zip(
            [v.get_value() for v in vlm.parameters(model).values()], vlm.parameters(base).values(), strict=True
        )
    )
    rng = np.random.default_rng(0)
    values = {p: v.get_value() for p, v in vlm.variables(model).items()}
    for path in [p for p in values if p.endswith((".adapter.a", ".adapter.b"))]:
        noise = 0.1 * rng.standard_normal(values[path].shape, np.float32)
        values[path] = values[path] + noise * (
            np.asarray(values[path.rpartition(".")[0] + ".a"]).any(-2, keepdims=True) if path.endswith("a") else 1
        )
    trained = vlm.bind(model, values)
    again = attach(base, extract(trained))
    assert abs(logits(trained) - logits(base)).max() > 0.01
    np.testing.assert_allclose(logits(again), logits(trained), atol=5e-5)
    ranks = {g.path: g.rank for g in again.adapters.groups}
    assert ranks["decoder.blocks.layer.attention.q.kernel"] == (4 if init in ("pissa", "olora") else 2)


def test_default_and_gaussian_beginnings_have_pefts_spread():
    group = targets.resolve(AdapterConfig(rank=64), families.preset("qwen2_5_vl_3b")).group("connector.hidden.kernel")
    shape = (5120, 5120)
    a, b = initial.pairs("default", group, shape, None, np.random.default_rng(0))
    assert abs(a).max() <= 5120**-0.5
    assert a.std() == pytest.approx(5120**-0.5 / 3**0.5, rel=0.01)
    assert not b.any()
    a, b = initial.pairs("gaussian", group, shape, None, np.random.default_rng(0))
    assert a.std() == pytest.approx(1 / 64, rel=0.01)
    assert not b.any()


def small_adapter(arrays, scale, a):
    b = AdapterParam(jnp.asarray(arrays["dora.B"].T), axes=("rank", "mlp"))
    magnitude = AdapterParam(jnp.asarray(arrays["dora.m"]), axes=("mlp",))
    scale = AdapterConstant(jnp.float32(scale), axes=())
    return LowRankAdapter(AdapterParam(a, axes=("embed", "rank")), b, scale, axes=("embed", "mlp"), magnitude=magnitude)


def test_no_gradient_flows_through_doras_norm(small):
    arrays, facts = small
    kernel, x, dy = jnp.asarray(arrays["W"].T), jnp.asarray(arrays["X"]), jnp.asarray(arrays["dora.dy"])
    scale, a, b = facts["dora"]["scaling"], jnp.asarray(arrays["dora.A"].T), jnp.asarray(arrays["dora.B"].T)

    def loss(a):
        return (small_adapter(arrays, scale, a)(x, x @ kernel, lambda: kernel) * dy).sum()

    def attached_loss(a):
        total = kernel + scale * a @ b
        return (x @ total * arrays["dora.m"] / jnp.linalg.norm(total, axis=0) * dy).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(a).T, arrays["dora.grad_A"], atol=5e-5)
    assert abs(np.asarray(jax.jit(jax.grad(attached_loss))(a)).T - arrays["dora.grad_A"]).max() > 0.1
    direct = np.linalg.norm(arrays["W"].T.astype(np.float64) + scale * np.asarray(a, np.float64) @ b, axis=0)
    np.testing.assert_allclose(column_norm(kernel, small_adapter(arrays, scale, a)), direct, rtol=2e-6)


def test_layers_of_a_stack_may_differ_in_rank_or_have_no_adapter():
    base = golden.base("qwen2_5_vl")
    config = AdapterConfig(
        rank=2,
        targets=("re:.*layers\\.1\\..*(q|up)_proj", "layers.0.mlp.up_proj"),
        use_dora=True,
        rank_pattern=(("layers.0.mlp.up_proj", 5),),
    )
    model = attach(base, config)
    groups = {g.path.rpartition(".layer.")[2]: g.ranks for g in model.adapters.groups}
    assert groups == {"attention.q.kernel": (0, 2), "mlp.up.kernel": (5, 2)}
    np.testing.assert_allclose(logits(model), logits(base), atol=1e-5)
    values = {p: v.get_value() for p, v in vlm.variables(model).items()}

    def loss(trained):
        return model_logits({**values, **trained}).sum()

    def model_logits(values):
        found = vlm.bind(model, values)
        return found.decoder.logits(found.hidden(golden.batch("qwen2_5_vl")).hidden)[..., 3]

    trained = {
        p: v + 0.1 * (v != 0) if p.endswith(".b") else v
        for p, v in values.items()
        if ".adapter." in p and "scale" not in p
    }
    grads = jax.jit(jax.grad(loss))(trained)
    q = "decoder.blocks.layer.attention.q.adapter"
    for name in ("a", "b", "magnitude"):
        assert not np.asarray(grads[f"{q}.{name}"])[0].any()
    up = "decoder.blocks.layer.mlp.up.adapter"
    gradient = np.asarray(grads[f"{up}.b"])[1]
    assert gradient[:2].any()
    assert not gradient[2:].any()


def test_what_dropout_keeps_is_the_share_asked_for_and_independent_of_neighbours_and_keys():
    share, shape = 0.9, (3, 500, 640)
    masks = [np.asarray(kept(jax.random.key(seed), share, shape)).astype(np.float64) - share for seed in (0, 1)]
    deviation = math.sqrt(share * (1 - share))

    def close_to_zero(product, spread):
        assert abs(product.mean()) < 5 * spread / math.sqrt(product.size)

    for mask in masks:
        close_to_zero(mask, deviation)
        for shift in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 7, 64)):
            close_to_zero(mask * np.roll(mask, shift, (0, 1, 2)), deviation**2)
        rows, columns = mask.sum(-1), mask.sum((0, 1))
        assert rows.std() == pytest.approx(deviation * math.sqrt(640), rel=0.1)
        assert columns.std() == pytest.approx(deviation * math.sqrt(1500), rel=0.1)
        # the four corners of rectangles
        close_to_zero(mask[:, :-3, :-5] * mask[:, 3:, :-5] * mask[:, :-3, 5:] * mask[:, 3:, 5:], deviation**4)
    close_to_zero(masks[0] * masks[1], deviation**2)


def test_dropout_follows_from_the_key_alone_and_touches_the_branch_alone():
    base = golden.base("qwen2_5_vl")
    model = attach(base, AdapterConfig(rank=2, dropout=0.5, targets=("decoder",)))
    same = logits(
        prepare(vlm.bind(model, {p: v.get_value() for p, v in vlm.variables(model).items()}), {}, jax.random.key(0))
    )
    np.testing.assert_allclose(same, logits(base), atol=1e-6)  # b is zero, so what is dropped has no effect
    values = {p: v.get_value() + (0.1 if p.endswith(".adapter.b") else 0) for p, v in vlm.variables(model).items()}

    def drawn(seed):
        return logits(prepare(vlm.bind(model, values), {}, jax.random.key(seed)))

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert abs(drawn(1) - drawn(2)).max() > 1e-3
    np.testing.assert_array_equal(logits(vlm.bind(model, values)), logits(vlm.bind(model, values)))
    one = adapter_of(prepare(vlm.bind(model, values), {}, jax.random.key(1)), "decoder.blocks.layer.attention.q.kernel")
    assert len({tuple(key) for key in np.asarray(one.key[...])}) == 2  # each layer draws by itself


QWEN, IDEFICS = "qwen2_5_vl_7b", "idefics2_8b"
PROJ = tuple(f"{name}_proj" for name in "q k v o gate up down".split())
NOTEBOOK = "re:.*(text_model|modality_projection|perceiver_resampler).*(down|gate|up|k|q|v|o)_proj.*$"


@pytest.mark.parametrize(
    ("preset", "picks", "use_dora", "count"),
    [
        (QWEN, ("all-linear",), False, 25_912_320),
        (QWEN, ("all-linear",), True, 27_735_296),
        (QWEN, PROJ, False, 23_794_688),
        (QWEN, ("q_proj", "v_proj"), False, 2_523_136),
        (QWEN, ("decoder.attention", "decoder.mlp"), False, 20_185_088),
        (QWEN, ("encoder",), False, 5_575_680),
        (QWEN, ("connector",), False, 151_552),
        (IDEFICS, ("all-linear",), False, 27_674_368),
        (IDEFICS, ("all-linear",), True, 29_484_912),
        (IDEFICS, PROJ, False, 24_819_712),
        (IDEFICS, ("q_proj", "v_proj"), False, 4_645_888),
        (IDEFICS, (NOTEBOOK,), False, 23_326_720),
        (IDEFICS, (NOTEBOOK,), True, 24_865_536),
        (IDEFICS, ("connector",), False, 2_355_200),
    ],
)
def test_targets_pick_what_peft_picks(preset, picks, use_dora, count):
    model = families.preset(preset)
    plan = targets.resolve(AdapterConfig(rank=8, targets=picks, use_dora=use_dora), model)
    text = targets.describe(plan, golden_template(model))
    assert int(text.splitlines()[-1].split()[-1].replace(",", "")) == count


@functools.cache
def golden_template(model):
    return vlm.abstract(model)


def test_entries_that_pick_nothing_are_named_and_an_empty_choice_is_refused():
    model = families.preset(QWEN)
    config = AdapterConfig(targets=("q_proj", "fc1"))
    assert targets.resolve(config, model).groups
    assert targets.unmatched(config, model)[0].startswith("adapter.targets: 'fc1' picks nothing; nearest: ")
    with pytest.raises(UserError, match=r"adapter.targets query_proj pick no module; nearest: .*q_proj"):
        targets.resolve(AdapterConfig(targets=("query_proj",)), model)


def test_adapters_are_counted_as_arithmetic_and_frozen_kernels_beside_them_need_no_gradient():
    from jvlm.training import flops

    base = golden.base("idefics2")
    model = attach(base, AdapterConfig(rank=4, targets=("decoder",)))
    assert flops.adapter_ranks(model) == {"decoder": 4.0}
    half = attach(base, AdapterConfig(rank=4, targets=("re:.*text_model.layers.1.*",)))
    assert flops.adapter_ranks(half) == {"decoder": 2.0}
    batches, frozen = [golden.batch("idefics2")], flops.Trained.towers()
    counts = flops.counts_of(batches)
    forward = flops.inference(base, counts)
    found = flops.of_batch(model, batches, frozen)
    assert found.encoder == forward.encoder
    assert forward.decoder < found.decoder < flops.training(base, counts, flops.Trained.towers(*vlm.TOWERS)).decoder
