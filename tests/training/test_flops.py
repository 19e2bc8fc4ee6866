"""The declared arithmetic, against XLA's own count of unscanned models and against brute force."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvlm import configs, families
from jvlm.adapters.attach import structure
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.targets import resolve
from jvlm.hardware import peak_flops
from jvlm.models import registry, vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from jvlm.models.contracts import EncoderConfig, VisionTokens
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.training import compiled_step, flops, trainable
from jvlm.training.optimizer.config import OptimizerConfig

TOKENS, PATCHES = 256, 512
DECODER = type(families.preset("mimo_vl_7b").decoder)
CONFIG = VLMConfig(
    family="qwen2_5_vl",
    encoder=QwenViTConfig(depth=2, hidden_size=640, num_heads=8, intermediate_size=1600, fullatt_block_indexes=(0, 1)),
    connector=PatchMergerConfig(),
    decoder=DECODER(
        vocab_size=2048,
        hidden_size=960,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        intermediate_size=2560,
        mrope_section=(20, 30, 30),
    ),
    image_token_id=1,
    precision=Precision(compute_dtype="float32", attention="reference"),
)


def _encoded(tokens) -> tuple[VisionTokens, PackedBatch]:
    """What a connector takes."""
    batch = _full_batch()
    return VisionTokens(tokens, batch.patch_segment_ids), batch


def _full_batch() -> PackedBatch:
    """One row, one conversation and one picture that fill it, every token learnt but the first."""
    index = np.full((1, TOKENS), -1, np.int32)
    index[0, : PATCHES // 4] = np.arange(PATCHES // 4)
    weights = np.ones((1, TOKENS), np.float32)
    return PackedBatch(
        tokens=np.ones((1, TOKENS), np.int32),
        segment_ids=np.ones((1, TOKENS), np.int32),
        positions=np.zeros((1, TOKENS, 3), np.int32),
        loss_weights=weights,
        patches=np.zeros((1, PATCHES, CONFIG.encoder.patch_values), np.float32),
        patch_segment_ids=np.ones((1, PATCHES), np.int32),
        patch_window_ids=np.ones((1, PATCHES), np.int32),
        patch_positions=np.zeros((1, PATCHES, 2), np.int32),
        vision_index=index,
    )


def _unscanned(variables):
    """Path -> shape, or a tuple of shapes where layers are stacked."""
    found = {}
    for path, variable in variables.items():
        value = variable.get_value()
        shapes = [value.shape[1:]] * value.shape[0] if ".layer." in path else None
        make = lambda shape, d=value.dtype: jax.ShapeDtypeStruct(shape, d)  # noqa: E731
        found[path] = tuple(make(s) for s in shapes) if shapes else make(value.shape)
    return found


def _by_xla(template: vlm.VLM, trained: Iterable[str]) -> float:
    """What XLA counts of the gradient by the parameters at these paths; of the forward pass if there are none."""
    values, batch = _unscanned(vlm.variables(template)), _full_batch()
    moving = {p: values[p] for p in trained}

    def loss(moving, still, patches):
        model = vlm.bind(template, {**still, **moving})
        return (model(dataclasses.replace(batch, patches=patches)).astype(jnp.float32) ** 2).sum()

    still = {p: v for p, v in values.items() if p not in moving}
    lowered = jax.jit(jax.grad(loss) if moving else loss).lower(moving, still, batch.patches)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("learnt", ["encoder connector decoder", "connector decoder", "connector", "decoder", ""])
def test_it_is_what_xla_counts_within_3_percent_whatever_is_frozen(learnt):
    towers = learnt.split()
    learnt = flops.Trained.towers(*towers)
    template = vlm.abstract(CONFIG)
    counts = flops.counts_of([_full_batch()])
    counted = flops.training(template, counts, learnt)
    # XLA counts what the reference attention and the logits of all tokens compute: no half, and one token more
    attention = flops.forward(template, counts)["decoder"].attention
    passes = 3 if towers else 1
    expected = counted.total + passes * attention + counted.head / counts.targets
    trained = [path for path in vlm.parameters(template) if path.partition(".")[0] in towers]
    assert _by_xla(template, trained) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("targets", ["decoder", "connector", "all-linear"])
def test_adapters_on_a_frozen_base_are_what_xla_counts_within_3_percent(targets):
    """4 FLOP of a frozen weight and token where a gradient passes through it, and not 6; the adapters' own beside."""
    adapter = AdapterConfig(rank=32, targets=(targets,))
    template = structure(vlm.abstract(CONFIG), resolve(adapter, CONFIG))
    trained = trainable.select(trainable.from_config(OptimizerConfig(), template.adapters), vlm.variables(template))
    learnt, ranks = flops.Trained.of(template, trained), flops.adapter_ranks(template)
    assert learnt == flops.Trained.towers()
    counts = flops.counts_of([_full_batch()])
    counted, work = flops.training(template, counts, learnt, ranks), flops.forward(template, counts)
    backward = flops.has_backward(learnt, ranks)
    assert backward["encoder"] == (targets == "all-linear")
    expected = counted.total + 3 * work["decoder"].attention + counted.head / counts.targets
    # nothing before the first adapted matrices is trained, so what comes into them needs no gradient
    first = {"decoder": work["decoder"].products[:3], "connector": work["connector"].products[:1]}.get(targets, ())
    per_layer = {"decoder": TOKENS, "connector": PATCHES // 4}
    expected -= sum(2 * per_layer[targets] * product.d_in * product.d_out for product in first)
    assert _by_xla(template, trained) == pytest.approx(expected, rel=0.03)
    as_if_trained = flops.training(template, counts, flops.Trained.towers(*vlm.TOWERS)).total
    assert _by_xla(template, trained) < 0.8 * as_if_trained


@pytest.mark.parametrize("modules", [("input_layernorm", "post_attention_layernorm"), ("lm_head",), ("connector",)])
def test_what_is_trained_whole_beside_adapters_is_what_xla_counts_within_3_percent(modules):
    """A trained norm takes gradients through its tower and none to the tower's matrices; a trained matrix its own."""
    adapter = AdapterConfig(rank=8, targets=("decoder.attention",), train_modules=modules)
    template = structure(vlm.abstract(CONFIG), resolve(adapter, CONFIG))
    trained = trainable.select(trainable.from_config(OptimizerConfig(), template.adapters), vlm.variables(template))
    learnt, ranks = flops.Trained.of(template, trained), flops.adapter_ranks(template)
    counts = flops.counts_of([_full_batch()])
    counted, work = flops.training(template, counts, learnt, ranks), flops.forward(template, counts)
    expected = counted.total + 3 * work["decoder"].attention + counted.head / counts.targets
    assert _by_xla(template, trained) == pytest.approx(expected, rel=0.03)
    assert learnt.shares["encoder"] == learnt.shares["decoder"] == 0
    assert learnt.shares["head"] == (modules == ("lm_head",))


def test_a_reward_model_has_a_matrix_of_one_score_in_the_place_of_a_head():
    experiment = configs.load("align/mimo_vl_7b_reward_model")
    template = compiled_step.template_of(experiment)
    trained = trainable.select(trainable.from_config(experiment.optimizer, template.adapters), vlm.variables(template))
    learnt = flops.Trained.of(template, trained)
    assert learnt.shares == {"encoder": 0, "connector": 0, "decoder": 0, "head": 1}
    counts = flops.Counts(np.asarray([64]), np.zeros(0, int), np.zeros(0, int), 0, 64)
    assert flops.forward(template, counts)["head"].total == 2 * 64 * template.config.decoder.hidden_size


def test_a_packed_batch_costs_the_sum_of_its_conversations_and_padding_nothing():
    template = vlm.abstract(CONFIG)
    batch = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), _full_batch())
    learnt = flops.Trained.towers(*vlm.TOWERS)
    segments, patches = np.zeros((2, TOKENS), np.int32), np.zeros((2, PATCHES), np.int32)
    lengths, sizes = {(0, 1): 100, (0, 2): 30, (1, 1): 7}, {(0, 1): 64, (0, 2): 16, (1, 1): 4}
    for (row, number), length in lengths.items():
        start = int((segments[row] > 0).sum())
        segments[row, start : start + length] = number
        start = int((patches[row] > 0).sum())
        patches[row, start : start + sizes[row, number]] = number
    packed = dataclasses.replace(
        batch,
        segment_ids=segments,
        loss_weights=(segments > 0).astype(np.float32),
        patch_segment_ids=patches,
        patch_window_ids=patches,
        vision_index=np.where(np.arange(TOKENS) < (patches > 0).sum(1, keepdims=True) // 4, 0, -1),
    )
    alone = []
    for key, length in lengths.items():
        frame = np.asarray([sizes[key]])
        counts = flops.Counts(np.asarray([length]), frame, frame, sizes[key] // 4, length - 1)
        alone.append(flops.training(template, counts, learnt).total)
    assert flops.of_batch(template, [packed], learnt).total == pytest.approx(sum(alone), rel=1e-12)


def test_windows_and_full_attention_of_the_vision_tower_are_counted_by_pairs():
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, fullatt_block_indexes=(1,)))
    counts = flops.Counts(np.asarray([8]), np.asarray([24, 8]), np.asarray([16, 8, 8]), 8, 4)
    work = flops.forward(vlm.abstract(config), counts)["encoder"]
    pairs = sum(n * n for n in (24, 8)) + sum(n * n for n in (16, 8, 8))
    assert work.attention == 4 * pairs * config.encoder.hidden_size


def test_adapters_cost_their_own_products_and_no_gradient_of_the_frozen_weights():
    template, counts = vlm.abstract(CONFIG), flops.counts_of([_full_batch()])
    frozen = flops.Trained.towers()
    work = flops.forward(template, counts)["decoder"]
    found = flops.training(template, counts, frozen, {"decoder": 8}).decoder
    own = sum(3 * 2 * p.uses * 8 * (p.d_in + p.d_out) for p in work.products)
    assert found == pytest.approx(2 * work.linear + 3 * work.attention + own)


def test_a_7b_model_needs_about_six_flop_for_each_parameter_and_token():
    template = vlm.abstract(families.preset("qwen2_5_vl_7b"))
    counts = flops.Counts(np.asarray([64]), np.zeros(0, int), np.zeros(0, int), 0, 64)
    learnt = flops.Trained.towers(*vlm.TOWERS)
    parameters = vlm.parameter_counts(template)["decoder"] - 152064 * 3584  # the embedding is looked up
    assert flops.training(template, counts, learnt).total == pytest.approx(6 * 64 * parameters, rel=0.001)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H200", 989),
        ("cpu", None),
    ],
)
def test_peaks_of_devices_are_those_of_their_data_sheets(kind, teraflops):
    assert peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)


def test_experts_cost_what_each_token_chooses_and_the_router():
    decoder = dataclasses.replace(CONFIG.decoder, num_layers=4)
    experts = MoEConfig(every=2, experts=5, top_k=3, intermediate_size=decoder.intermediate_size)
    counts = flops.counts_of([_full_batch()])
    templates = [
        vlm.abstract(dataclasses.replace(CONFIG, decoder=d))
        for d in (decoder, dataclasses.replace(decoder, mlp=experts))
    ]
    linear = [flops.forward(template, counts)["decoder"].linear for template in templates]
    D, F = decoder.hidden_size, decoder.intermediate_size
    assert linear[1] - linear[0] == 2 * TOKENS * 2 * (2 * 3 * D * F + 5 * D)  # in two layers, two more experts each
    assert [flops.experts(template, TOKENS) for template in templates] == [0, 2 * TOKENS * 2 * 3 * 3 * D * F]


@pytest.mark.parametrize(
    "config", [CAbstractorConfig(grid=16, out_grid=8, hidden_size=512, depth=2), PooledMLPConfig(grid=16, out_grid=8)]
)
def test_a_connector_of_frames_costs_what_xla_counts_within_4_percent(config):
    frames, width = 2, 640
    model = dataclasses.replace(
        CONFIG, connector=config, encoder=dataclasses.replace(CONFIG.encoder, hidden_size=width)
    )
    template = vlm.abstract(model)
    counts = flops.Counts(
        np.zeros(0), np.full(frames, config.patches_per_image), np.zeros(0), frames * config.out_grid**2, 0
    )
    graph, state = nnx.split(template.connector)
    features = jax.ShapeDtypeStruct((1, frames * config.patches_per_image, width), np.float32)
    lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(*_encoded(x)).tokens).lower(state, features)
    pooling = 2 * frames * width * (config.out_grid * config.grid**2 + config.out_grid**2 * config.grid)
    counted = flops.forward(template, counts)["connector"].linear + pooling
    assert lowered.cost_analysis()["flops"] == pytest.approx(counted, rel=0.04)


@pytest.mark.parametrize("preset", ["mimo_vl_7b", "qwen2_5_vl_3b", "idefics2_8b", "mm1_5_7b"])
def test_every_matrix_of_encoder_and_decoder_is_counted_once(preset):
    """Of one token and one patch, against the parameters that the model has: nothing is forgotten, nothing invented."""
    template = vlm.abstract(families.preset(preset))
    one = np.ones(1, int)
    work = flops.forward(template, flops.Counts(one, one, one, 1, 0))
    for tower in ("encoder", "decoder"):
        variables = nnx.to_flat_state(nnx.state(getattr(template, tower), nnx.Param))
        axes = [(variable.get_metadata()["axes"], variable.get_value().size) for _, variable in variables]
        matrices = sum(size for names, size in axes if len(names) == 2 and not {"vocab", "position"} & set(names))
        assert work[tower].linear == 2 * matrices


def test_a_part_that_declares_no_arithmetic_says_so():
    @dataclasses.dataclass(frozen=True)
    class Plain(EncoderConfig):
        hidden_size: int = 8

    with pytest.raises(TypeError, match="the arithmetic of Plain is not known: it does not define `work`"):
        Plain().work(flops.counts_of([_full_batch()]))


def test_the_perceiver_costs_what_xla_counts_within_4_percent():
    config = PerceiverConfig(projection_size=1024, latents=32, depth=2, num_heads=8, num_kv_heads=2, head_dim=64)
    precision = Precision(compute_dtype="float32", attention="reference")
    module = nnx.eval_shape(lambda: registry.build(config, d_in=768, d_out=1536, precision=precision, rngs=nnx.Rngs(0)))
    batch = _full_batch()
    text = ("tokens", "segment_ids", "positions", "loss_weights", "vision_index")
    # room for the latents of one frame
    batch = dataclasses.replace(batch, **{field: getattr(batch, field)[:, :32] for field in text})
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)

    def run(values, features):
        bound = [(path, variable.replace(value)) for (path, variable), value in zip(flat, values, strict=True)]
        return nnx.merge(graph, nnx.from_flat_state(bound))(_encoded(features)[0], batch).tokens

    shapes = []
    for path, variable in flat:
        value = variable.get_value()
        one = jax.ShapeDtypeStruct(value.shape["layer" in path :], value.dtype)
        shapes.append((one,) * value.shape[0] if "layer" in path else one)  # unscanned
    features = jax.ShapeDtypeStruct((1, PATCHES, 768), np.float32)
    lowered = jax.jit(run).lower(shapes, features)
    counts = flops.Counts(np.asarray([32]), np.asarray([PATCHES]), np.zeros(0, int), 32, 0)
    counted = config.work(counts, 768, 1536).total
    assert lowered.cost_analysis()["flops"] == pytest.approx(counted, rel=0.04)


def test_cross_attention_makes_keys_of_features_and_all_else_of_tokens():
    plain = families.preset("idefics2_8b")
    decoder = CrossAttentionTransformerConfig.of(plain.decoder, cross_attention_every=4)
    reading = dataclasses.replace(plain, decoder=decoder)
    frames = np.asarray([729] * 3)
    counts = flops.Counts(np.asarray([500, 300]), frames, frames, 192, 100)
    before, after = (flops.forward(vlm.abstract(config), counts)["decoder"] for config in (plain, reading))
    tokens, features, layers, width, kv, hidden = 800, 3 * 64, 8, 4096, 1024, 14336
    of_token, of_feature = 2 * width * width + 3 * width * hidden, 2 * width * kv
    assert after.linear - before.linear == pytest.approx(2 * layers * (tokens * of_token + features * of_feature))
    assert after.attention - before.attention == pytest.approx(4 * layers * tokens * 64 * width, rel=1e-6)
