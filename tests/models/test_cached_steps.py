"""Steps with a cache: scanned over the layers they are what they are unrolled, and a layer's pages are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvlm.models.batch import CacheSizes, DecodeStep, PrefillStep
from jvlm.models.contracts import DecoderInputs
from jvlm.models.decoders import transformer
from jvlm.models.decoders.cross_attention import (
    CrossAttentionTransformer,
    CrossAttentionTransformerConfig,
    VisionMemory,
)
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import Transformer, TransformerConfig
from jvlm.models.layers import Precision
from tests import quick

D, S, PAGE = 32, 24, 8
SMALL = {"vocab_size": 50, "hidden_size": D, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
SMALL |= {"intermediate_size": 48}
SIZES = CacheSizes(pages=7, page_size=PAGE, slots=2, vision_tokens=4)
# two sequences of two pages: of the first, a chunk of 13 after a page; of the second, 5 tokens, which is all there is
SEGMENTS = np.array([[1] * 13 + [0] * 3 + [2] * 5 + [0] * 3], np.int32)
STEP = PrefillStep(
    pages=jnp.asarray([[2, 3, 4]]),
    past_pages=jnp.asarray([[1]]),
    past_segments=jnp.ones((1, PAGE), jnp.int32),
    memory_index=jnp.asarray([[[0, 1, 2, 3], [-2, -2, 4, 5]]]),
)
DECODERS = {
    "dense": (Transformer, TransformerConfig(**SMALL)),
    "experts in every second layer": (
        Transformer,
        TransformerConfig(**SMALL, mlp=MoEConfig(experts=3, top_k=2, intermediate_size=16, every=2)),
    ),
    "cross-attention": (
        CrossAttentionTransformer,
        CrossAttentionTransformerConfig(**SMALL, cross_attention_every=2),
    ),
}


def _run(monkeypatch, decoder, inputs, cache, step, scans):
    """Return (hidden states, cache)."""
    monkeypatch.setattr(transformer, "scans", lambda _: scans)
    hidden, cache, _ = jax.jit(lambda inputs, cache: decoder(inputs, cache=cache, step=step))(inputs, cache)
    return jax.tree.map(np.asarray, (hidden, cache))


@pytest.mark.parametrize("name", [*DECODERS, "vectors for later layers"])
def test_scanned_over_the_layers_a_step_is_what_it_is_unrolled(monkeypatch, name):
    kind, config = DECODERS.get(name, DECODERS["dense"])
    decoder = quick.random_module(lambda: kind(config, precision=Precision(compute_dtype="float32"), rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(decoder)):
        if "gate" in str(path[-1]):  # of cross-attention, which begin at zero
            variable.set_value(variable.get_value() + 0.5)
            nnx.update(decoder, nnx.from_flat_state([(path, variable)]))
    rng = np.random.default_rng(0)
    x, vision = (jnp.asarray(rng.normal(size=(1, n, D)), jnp.float32) for n in (S, 6))
    memory = deepstack = None
    if name == "cross-attention":
        images = jnp.asarray([[1, 1, 1, 1, 2, 2]])
        read = jnp.asarray([[1] * 13 + [0] * 3 + [2] * 5 + [0] * 3])
        memory = VisionMemory(vision, images, read, read)
    if name == "vectors for later layers":
        deepstack = jnp.asarray(rng.normal(size=(2, 1, S, D)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(S)[None, :, None], (1, S, 3))
    inputs = DecoderInputs(x, positions, jnp.asarray(SEGMENTS), memory, deepstack=deepstack)
    # what earlier chunks left, in every page of every layer
    start = jax.tree.map(
        lambda part: jnp.asarray(rng.normal(size=part.shape), part.dtype), jax.jit(lambda: decoder.init_cache(SIZES))()
    )
    scanned, unrolled = (_run(monkeypatch, decoder, inputs, start, STEP, scans) for scans in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), scanned, unrolled)
    # the pages that nothing was written to are as they were, in every layer; those of the step are not
    changed = [
        {page for page in range(SIZES.pages) if not np.array_equal(new[layer, page], old[layer, page])}
        for new, old in zip(jax.tree.leaves(scanned[1]), jax.tree.leaves(start), strict=True)
        if old.shape[1] == SIZES.pages
        for layer in range(len(old))
    ]
    assert changed == [{2, 3, 4}] * len(changed)
    assert len(changed) == 2 * config.num_layers

    rows = {"cache_index": jnp.asarray([21, 5]), "block_tables": jnp.asarray([[1, 2, 3], [4, 5, 0]])}
    one = DecoderInputs(x.reshape(-1, 1, D)[:2], jnp.full((2, 1, 3), 21), jnp.ones((2, 1), jnp.int32))
    step = DecodeStep(**rows, slots=jnp.arange(2))
    scanned, unrolled = (_run(monkeypatch, decoder, one, scanned[1], step, scans) for scans in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), scanned, unrolled)
