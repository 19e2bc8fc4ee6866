"""Parts of a test's own take part in a model by the contracts alone; parts that lack a member are refused by name."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvlm.data import packing
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.generate import complete
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import contracts, layers, registry, vlm
from jvlm.models.attention import Attention
from jvlm.models.batch import DecoderOutput, DecodeStep
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.contracts import ConnectorConfig, DecoderConfig, DecoderInputs, EncoderConfig, VisionTokens
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.layer_stack import LayerStack, PerLayer
from jvlm.models.vlm import VLM
from jvlm.training.supervised import supervised_loss
from tests import quick
from tests.inference.support import prompt
from tests.parallel import models
from tests.support import picture

MODELS, KINDS = Path(vlm.__file__).parent, ("encoder", "connector", "decoder")


@dataclasses.dataclass(frozen=True)
class LeakyConfig(DecoderConfig):
    vocab_size: int = 160
    hidden_size: int = 64
    max_position_embeddings: int = 512

    @property
    def prefills_whole(self) -> bool:
        """The state at the end of a chunk is not handed on to the next one."""
        return True


class Leaky(nnx.Module):
    """A recurrent decoder, h_t = 0.8 h_(t-1) + W x_t within the conversation; it caches h at each place of a page."""

    def __init__(self, config: LeakyConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, D = config, config.hidden_size
        table = precision.init_weight(rngs.params(), (config.vocab_size, D), D)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.into = layers.Linear(D, D, ("embed", "mlp"), bias=False, precision=precision, rngs=rngs)
        self.norm = layers.RMSNorm(D, 1e-6, precision=precision)

    def embed(self, tokens):
        return self.embedding[...][tokens]

    def fuse(self, embeddings, vision, batch):
        return DecoderInputs.of(contracts.replace_placeholders(embeddings, vision, batch), batch)

    def __call__(self, inputs: DecoderInputs, *, cache: Any = None, step: Any = None) -> DecoderOutput:
        x, segments = self.into(inputs.embeddings), inputs.segment_ids
        if isinstance(step, DecodeStep):
            size, rows = cache.shape[2], jnp.arange(len(x))

            def place(index):
                return 0, step.block_tables[rows, index // size], index % size

            h = 0.8 * cache[place(jnp.maximum(step.cache_index - 1, 0))] + x[:, 0]
            return DecoderOutput(self.norm(h)[:, None], cache.at[place(step.cache_index)].set(h), {})

        def advance(h, now):
            x, begins = now
            h = jnp.where(begins[:, None], 0.0, 0.8 * h) + x
            return h, h

        begins = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
        _, h = jax.lax.scan(advance, jnp.zeros_like(x[:, 0]), (x.swapaxes(0, 1), begins.T))
        h = h.swapaxes(0, 1)
        if step is not None:
            cache = cache.at[0, step.pages[0]].set(h.reshape(-1, *cache.shape[2:]))
        return DecoderOutput(self.norm(h), cache, {"loss": jnp.full(1, 0.25)})

    def init_cache(self, sizes):
        return jnp.zeros((1, sizes.pages, sizes.page_size, self.config.hidden_size))

    def logits(self, hidden):
        return hidden.astype(jnp.float32) @ self.embedding[...].T

    def output_kernel(self):
        return self.embedding[...], True


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    vlm._structure.cache_clear()


def test_a_decoder_from_outside_gives_logits_and_loss():
    registry.register(LeakyConfig)(Leaky)
    config = dataclasses.replace(models.qwen2_5_vl(), decoder=LeakyConfig())
    model, batch = quick.random_model(config), models.batch(config)
    values = {path: np.asarray(v.get_value(), np.float64) for path, v in vlm.parameters(model).items()}
    vision = np.asarray(quick.call(VLM.encode, model, batch).tokens)
    table, into = values["decoder.embedding"], values["decoder.into.kernel"]
    scale = values["decoder.norm.scale"]
    logits, nats = np.asarray(model(batch)), 0.0
    for b in (0, 1, 2):
        h = np.zeros(64)
        for s in range(batch.tokens.shape[1]):
            index, begins = batch.vision_index[b, s], s == 0 or batch.segment_ids[b, s] != batch.segment_ids[b, s - 1]
            x = vision[b, index] if index >= 0 else table[batch.tokens[b, s]]
            h = (0 if begins else 0.8) * h + x @ into
            expected = table @ (scale * h / np.sqrt((h**2).mean() + 1e-6))
            np.testing.assert_allclose(logits[b, s], expected, atol=1e-4)
    loss = quick.call(supervised_loss, model, batch)
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    weights, targets = batch.loss_weights[:, 1:] * same, np.asarray(batch.tokens)[:, 1:, None]
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], targets, 2)[..., 0]
    assert float(loss.metrics["loss"].sum) == pytest.approx(float((nats * weights).sum()), rel=1e-4)
    assert float(loss.metrics["aux_loss"].sum) == pytest.approx(0.25 * weights.sum(), rel=1e-5)


def test_a_decoder_from_outside_generates_with_its_cache_what_whole_passes_say(tiny):
    registry.register(LeakyConfig)(Leaky)
    decoder = LeakyConfig(tiny.model.config.decoder.vocab_size, tiny.model.config.decoder.hidden_size)
    precision = dataclasses.replace(tiny.model.config.precision, initializer_range=None)
    config = dataclasses.replace(tiny.model.config, decoder=decoder, precision=precision)
    model = quick.random_model(config, 1)
    asked = prompt("<image>what is it?", images=[picture(84, 112)])
    engine = Engine(model, tiny.processor)
    example = tiny.processor.encode(asked, generation_prompt=True)
    batch, expected = packing.assemble([[example]], 128, example.num_patches), []
    for length in range(example.length, example.length + 5):
        scores = np.array(model(batch)[0, length - 1])
        scores[engine.banned] = -np.inf
        expected.append(int(scores.argmax()))
        batch.tokens[0, length], batch.segment_ids[0, length] = expected[-1], 1
    sampling = SamplingConfig(max_new_tokens=5, stop_token_ids=())
    (found,) = complete(engine, [example], sampling, request_ids=[0])
    assert list(found.tokens) == expected
    assert len(set(expected)) > 1


def test_a_decoder_without_a_cache_computes_logits_and_is_refused_by_name_where_it_should_generate(tiny):
    class Uncached(Leaky):
        init_cache = None

    registry.register(LeakyConfig)(Uncached)
    decoder = LeakyConfig(tiny.model.config.decoder.vocab_size, tiny.model.config.decoder.hidden_size)
    model = quick.random_model(dataclasses.replace(tiny.model.config, decoder=decoder))
    example = tiny.processor.encode(prompt("what is it?"), generation_prompt=True)
    assert np.isfinite(model(packing.assemble([[example]], 64, 0))).all()
    with pytest.raises(UserError, match=r"Uncached cannot generate: it lacks init_cache\(sizes\)"):
        Engine(model, tiny.processor)


def test_parts_that_lack_members_are_refused_with_what_each_is_for():
    @dataclasses.dataclass(frozen=True)
    class NarrowConfig(DecoderConfig):
        hidden_size: int = 8

    class Narrow(nnx.Module):
        def embed(self, tokens): ...

    with pytest.raises(TypeError, match="Narrow cannot be registered; it lacks") as caught:
        registry.register(NarrowConfig)(Narrow)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in lines] == [
        "NarrowConfig.vocab_size",
        "NarrowConfig.max_position_embeddings",
        "Narrow.fuse",
        "Narrow.__call__",
        "Narrow.logits",
        "Narrow.output_kernel",
    ]
    assert lines[0] == "NarrowConfig.vocab_size: number of rows of the embedding"
    encoder = dataclasses.make_dataclass("BareConfig", [], bases=(EncoderConfig,), frozen=True)
    with pytest.raises(TypeError, match=r"BareConfig.hidden_size.*\n.*BareConfig.patch_values: numbers in a flattened"):
        registry.register(encoder)(Leaky)
    with pytest.raises(TypeError, match="derives from none of EncoderConfig, ConnectorConfig, DecoderConfig"):
        registry.register(layers.RopeScaling)(Leaky)


def test_vision_tokens_that_enter_later_layers_are_refused_by_a_decoder_that_would_drop_them():
    @dataclasses.dataclass(frozen=True)
    class DeepConfig(ConnectorConfig):
        pass

    class Deep(nnx.Module):
        def __init__(self, config, *, d_in, d_out, placeholders_per_image, precision, rngs):
            self.map = layers.Linear(d_in, d_out, ("embed", "mlp"), bias=False, precision=precision, rngs=rngs)

        def __call__(self, vision: VisionTokens, batch) -> VisionTokens:
            tokens = self.map(vision.tokens[:, ::4])
            return VisionTokens(tokens, vision.image_ids[:, ::4], (tokens, tokens))

    registry.register(DeepConfig)(Deep)
    few = dataclasses.replace(models.qwen2_5_vl().decoder, num_layers=1)
    for decoder in (few, models.mm1_5().decoder, models.cross_attention().decoder):
        model = vlm.abstract(dataclasses.replace(models.qwen2_5_vl(), connector=DeepConfig(), decoder=decoder))
        with pytest.raises(ValueError, match=r"this connector returns 2 sets of them \(VisionTokens.deepstack\)"):
            nnx.eval_shape(VLM.hidden, model, models.batch(model.config))


@pytest.mark.parametrize("attends_to", ["last", "all"])
def test_cross_attention_reads_images_of_any_number_of_tokens_from_any_connector(attends_to):
    """A patch merger gives each image as many tokens as its patches ask for; the image of each comes with it."""
    config = models.qwen2_5_vl()
    fields = {"cross_attention_every": 1, "attends_to": attends_to}
    decoder = CrossAttentionTransformerConfig.of(dataclasses.replace(config.decoder, num_layers=1), **fields)
    config = dataclasses.replace(config, connector=PatchMergerConfig(), decoder=decoder)
    model, batch = quick.random_model(config), models.batch(config)
    batch = jax.tree.map(lambda x: x[:1], batch)
    images = np.repeat([1, 2, 3, 0], [16, 48, 64, 128])[None].astype(np.int32)
    segments = np.repeat([1, 2, 0], [60, 60, 8])[None].astype(np.int32)
    index = np.full((1, 128), -1, np.int32)
    index[0, [4, 30, 70]] = [0, 4, 16]  # a placeholder for each image: its first token
    batch = dataclasses.replace(batch, patch_segment_ids=images, segment_ids=segments, vision_index=index)
    values = {path: v.get_value() for path, v in vlm.parameters(model).items()}
    values |= {path: jnp.full_like(v, 0.8) for path, v in values.items() if path.endswith("_gate")}
    model = vlm.bind(model, values)
    vision, embeddings = quick.call(VLM.encode, model, batch), model.decoder.embed(jnp.asarray(batch.tokens))
    assert vision.image_ids[0].tolist() == [1] * 4 + [2] * 12 + [3] * 16 + [0] * 32

    @jax.jit
    def influence(tokens, position):
        def hidden(tokens):
            inputs = model.decoder.fuse(embeddings, vision._replace(tokens=tokens), batch)
            inputs = dataclasses.replace(
                inputs, segment_ids=jnp.arange(1, 129)[None]
            )  # self-attention sees itself only
            return model.decoder(inputs).hidden[0, position].sum()

        return jnp.abs(jax.grad(hidden)(tokens)).max(-1)[0]

    read = {3: (), 4: (1,), 29: (1,), 30: (1, 2), 59: (1, 2), 60: (), 69: (), 70: (3,), 119: (3,), 125: ()}
    for position, wanted in read.items():
        found = np.asarray(influence(vision.tokens, position)) > 0
        wanted = wanted[-1:] if attends_to == "last" else wanted
        np.testing.assert_array_equal(found, np.isin(np.asarray(vision.image_ids[0]), wanted), str(position))


def test_the_assembly_and_the_plain_decoder_name_no_part():
    """Neither imports an encoder, a connector, or another decoder."""
    for file in ("vlm.py", "decoders/transformer.py", "contracts.py"):
        tree = ast.parse((MODELS / file).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [m for m in imported if m and m.startswith(tuple(f"jvlm.models.{k}s." for k in KINDS))], file


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (4, 4)) / 2, axes=("embed", "mlp"))


def _add(layer, x, value):
    bias, scale = value or (jnp.zeros(4), 1)
    y = jnp.tanh(x @ layer.kernel[...]) * scale + bias
    return y, {"sum": y.sum(), "bias": bias}


@pytest.mark.parametrize("values", [None, "stacked", "separate"])
@pytest.mark.parametrize("separate_parameters", [False, True])
def test_a_layer_stack_gives_the_same_however_parameters_and_values_are_stored(values, separate_parameters):
    stack = LayerStack(Layer, 3, rngs=nnx.Rngs(0))
    kernels = np.asarray(stack.layer.kernel[...])
    if separate_parameters:
        graph, state = nnx.split(stack)
        state = jax.tree.map(lambda v: v.replace(tuple(v[...])), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        stack = nnx.merge(graph, state)
    biases, scales = np.arange(12, dtype=np.float32).reshape(3, 4) / 9, np.array([1, 2, 3], np.float32)
    given = {
        None: None,
        "stacked": (biases, scales),
        "separate": PerLayer.of([(jnp.asarray(b), s) for b, s in zip(biases, scales, strict=True)]),
    }[values]
    x = np.ones(4, np.float32)
    found, outputs = jax.jit(lambda x: stack(_add, x, given, remat="full"))(x)
    for i in range(3):
        x = np.tanh(x @ kernels[i]) * (scales[i] if values else 1) + (biases[i] if values else 0)
        np.testing.assert_allclose(outputs[i]["sum"], x.sum(), rtol=1e-5)
        np.testing.assert_allclose(outputs.stacked()["sum"][i], x.sum(), rtol=1e-5)
    np.testing.assert_allclose(found, x, rtol=1e-5)
    assert outputs.stacked()["bias"].shape == (3, 4)
    assert len(list(outputs)) == len(outputs) == 3
    assert outputs.is_stacked == (values != "separate" and not separate_parameters)


def test_values_of_another_number_of_layers_are_refused():
    stack = LayerStack(Layer, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="values of 2 layers for a stack of 3"):
        stack(_add, jnp.ones(4), PerLayer.of([None, None]), remat="none")


def test_one_attention_module_is_fused_or_not_with_the_same_result():
    rng, common = np.random.default_rng(0), {"qkv_bias": True, "precision": models.PRECISION}
    apart = Attention(16, 4, rngs=nnx.Rngs(0), **common)
    fused = Attention(16, 4, fused_qkv=True, rngs=nnx.Rngs(0), **common)
    parts = [np.asarray(getattr(apart, name).kernel[...]).reshape(16, 4, 1, 4) for name in "qkv"]
    fused.qkv_by_head.kernel[...] = jnp.asarray(np.concatenate(parts, 2).reshape(16, 48))
    fused.out.kernel[...] = apart.out.kernel[...]
    x, segments = rng.normal(size=(1, 10, 16)).astype(np.float32), np.repeat([[1, 2]], 5, axis=1).astype(np.int32)
    rotary = layers.rotary_embedding(np.arange(10)[None, :, None], np.zeros(2, int), np.float32([1.0, 0.1]))
    found = [module(jnp.asarray(x), jnp.asarray(segments), rotary=rotary) for module in (apart, fused)]
    np.testing.assert_allclose(*found, atol=1e-6)
    with pytest.raises(ValueError, match="fused_qkv needs as many key heads as query heads"):
        Attention(16, 4, num_kv_heads=2, fused_qkv=True, rngs=nnx.Rngs(0), **common)
