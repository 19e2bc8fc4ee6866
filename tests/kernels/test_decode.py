"""Attention to a cache equals attention to the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import cached_attention, open_cache, reference_attention

T, D = 24, 8


@pytest.mark.parametrize(("rows", "heads", "kv_heads"), [(1, 4, 2), (3, 4, 1), (1, 2, 1)])
def test_tokens_one_by_one_equal_causal_attention_over_the_whole_sequence(rows, heads, kv_heads):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(rows, T, h, D)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    segments = np.ones((rows, T), np.int32)
    expected, _ = reference_attention(*map(jnp.asarray, (q, k, v, segments, segments)), causal=True)
    # rows begin with prompts of different lengths, and the places behind a prompt hold rubbish
    lengths = 5 + 2 * np.arange(rows)
    longest = int(lengths.max())
    held = np.arange(longest) < lengths[:, None]
    prompt = [np.where(held[..., None, None], x[:, :longest], 1e3).astype(np.float32) for x in (k, v)]
    cache = open_cache(*map(jnp.asarray, prompt), T)
    step = jax.jit(cached_attention)
    for i in range(T - longest):
        place = lengths + i
        new = [jnp.asarray(np.take_along_axis(x, place[:, None, None, None], axis=1)) for x in (q, k, v)]
        visible = (np.arange(T) <= place[:, None]).astype(np.int32)
        out, cache = step(*new, cache, jnp.asarray(place, jnp.int32), jnp.asarray(visible))
        wanted = np.take_along_axis(np.asarray(expected), place[:, None, None, None], axis=1)
        np.testing.assert_allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_donated_cache_is_updated_in_place(rows):
    places, kv_heads = 4096, 2
    shapes = [(rows, 1, 4, D), (rows, 1, kv_heads, D), (rows, 1, kv_heads, D)]
    q, k, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    cache = (
        jax.ShapeDtypeStruct((rows, kv_heads, D, places), jnp.float32),
        jax.ShapeDtypeStruct((rows, kv_heads, places, D), jnp.float32),
    )
    place = jax.ShapeDtypeStruct((rows,), jnp.int32)
    visible = jax.ShapeDtypeStruct((rows, places), jnp.int32)
    memory = (
        jax.jit(cached_attention, donate_argnums=3).lower(q, k, v, cache, place, visible).compile().memory_analysis()
    )
    held = 4 * rows * kv_heads * D * places
    assert memory.alias_size_in_bytes == 2 * held
    assert memory.temp_size_in_bytes < held


def test_more_than_one_new_token_is_refused():
    cache = open_cache(jnp.zeros((1, 4, 2, D)), jnp.zeros((1, 4, 2, D)), 8)
    new = jnp.zeros((1, 2, 2, D))
    # by the shape annotation, which tests check, or else by the function itself
    with pytest.raises((ValueError, TypeError), match=r"one new token a row, got 2|B 1 H D"):
        cached_attention(new, new, new, cache, jnp.zeros(1, jnp.int32), jnp.ones((1, 8), jnp.int32))
