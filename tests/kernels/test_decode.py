"""Attention to a cache equals attention to the whole sequence, contiguous or paged, with every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import (
    Unavailable,
    cached_attention,
    chunk_attention,
    decode_attention,
    decode_implementations,
    extend_cache,
    init_cache,
    init_pages,
    read_pages,
)

D = 16
every_implementation = pytest.mark.parametrize("implementation", decode_implementations())


def options_of(implementation):
    return {"implementation": implementation, "interpret": implementation.startswith("pallas")}


def brute_force(q, k, v, lengths, window=None):
    """float64, one token at a time. k and v [B, T, K, D] hold each sequence from position 0 on."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, S, H, _ = q.shape
    out = np.zeros(q.shape)
    for b, s, h in np.ndindex(B, S, H):
        position = int(lengths[b]) - S + s
        first = 0 if window is None else max(0, position - window + 1)
        if position >= 0:
            keys = slice(first, position + 1)
            scores = k[b, keys, h // (H // k.shape[2])] @ q[b, s, h] * D**-0.5
            weights = np.exp(scores - scores.max())
            out[b, s, h] = weights @ v[b, keys, h // (H // k.shape[2])] / weights.sum()
    return out


def random_call(B, S, heads, kv_heads, T, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, n, h, D)).astype(np.float32) for n, h in ((S, heads), (T, kv_heads), (T, kv_heads))]


def paged(k, v, size, seed=0):
    """(pages, block tables) that hold the same keys and values at random max_length, among pages of rubbish."""
    B, T, K, _ = k.shape
    count = -(-T // size)
    rng = np.random.default_rng(seed)
    order = rng.permutation(B * count + 3)
    keys = rng.normal(size=(len(order), K, D, size)).astype(np.float32)
    values = rng.normal(size=(len(order), K, size, D)).astype(np.float32)
    tables = order[: B * count].reshape(B, count)
    for b, n in np.ndindex(B, count):
        part = slice(n * size, (n + 1) * size)
        keys[tables[b, n]] = k[b, part].transpose(1, 2, 0)
        values[tables[b, n]] = v[b, part].transpose(1, 0, 2)
    return tuple(map(jnp.asarray, (keys, values))), jnp.asarray(tables, jnp.int32)


CASES = {
    "one row": {"heads": 4, "kv_heads": 2, "lengths": [77]},
    "rows of different lengths": {"heads": 4, "kv_heads": 1, "lengths": [1, 130, 256, 97]},
    "one head each": {"heads": 2, "kv_heads": 2, "lengths": [200, 3]},
    "a few new tokens": {"heads": 4, "kv_heads": 2, "lengths": [5, 190], "S": 5},
    "new tokens before the beginning": {"heads": 4, "kv_heads": 2, "lengths": [2, 0, 60], "S": 3},
    "window": {"heads": 4, "kv_heads": 2, "lengths": [250, 30], "window": 40},
    "window, a few new tokens": {"heads": 2, "kv_heads": 1, "lengths": [250, 133], "window": 10, "S": 4},
}


CONTIGUOUS = ("rows of different lengths", "new tokens before the beginning", "window, a few new tokens")


@pytest.mark.parametrize(
    ("case", "pages", "implementation"),
    [
        *((case, 32, name) for case in CASES for name in decode_implementations()),
        *((case, None, name) for case in CONTIGUOUS for name in decode_implementations() if name != "xla_pages"),
    ],
)
def test_new_tokens_see_their_past_and_nothing_else(case, pages, implementation):
    settings = dict(CASES[case])
    lengths, S, window = np.array(settings.pop("lengths")), settings.pop("S", 1), settings.pop("window", None)
    q, k, v = random_call(len(lengths), S, T=256, **settings)
    expected = brute_force(q, k, v, lengths, window)
    if pages is None:
        cache, tables = init_cache(jnp.asarray(k), jnp.asarray(v), 256), None
    else:
        cache, tables = paged(k, v, pages)
    decode = jax.jit(functools.partial(decode_attention, window=window, **options_of(implementation)))
    found = decode(jnp.asarray(q), cache, jnp.asarray(lengths), block_tables=tables)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@every_implementation
def test_bfloat16_is_summed_in_float32(implementation):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_call(2, 1, 4, 2, 256))
    pages, tables = paged(np.asarray(k, np.float32), np.asarray(v, np.float32), 64)
    cache = tuple(x.astype(jnp.bfloat16) for x in pages)
    decode = jax.jit(functools.partial(decode_attention, **options_of(implementation)))
    found = decode(q, cache, jnp.asarray([256, 100]), block_tables=tables)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), brute_force(q, k, v, [256, 100]), atol=2e-2)


@pytest.mark.parametrize("pages", [None, 8], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "new"), [(1, 4, 2, 1), (3, 4, 1, 2), (1, 2, 1, 3)])
def test_tokens_put_in_one_by_one_equal_causal_attention_over_the_whole_sequence(rows, heads, kv_heads, new, pages):
    T = 24
    q, k, v = random_call(rows, T, heads, kv_heads, T)
    expected = brute_force(q, k, v, [T] * rows)
    # rows begin with prompts of different lengths, and the max_length behind a prompt hold rubbish
    lengths = 5 + 2 * np.arange(rows)
    longest = int(lengths.max())
    held = np.arange(longest) < lengths[:, None]
    prompt = [np.where(held[..., None, None], x[:, :longest], 1e3).astype(np.float32) for x in (k, v)]
    if pages is None:
        cache, tables = init_cache(*map(jnp.asarray, prompt), T), None
    else:
        full = [np.pad(x, ((0, 0), (0, T - longest), (0, 0), (0, 0)), constant_values=1e3) for x in prompt]
        cache, tables = paged(*full, pages)
    step = jax.jit(cached_attention)
    for i in range(0, T - longest - new + 1, new):
        positions = (lengths + i)[:, None] + np.arange(new)
        fresh = [jnp.asarray(np.take_along_axis(x, positions[:, :, None, None], axis=1)) for x in (q, k, v)]
        out, cache = step(*fresh, cache, jnp.asarray(lengths + i, jnp.int32), block_tables=tables)
        wanted = np.take_along_axis(expected, positions[:, :, None, None], axis=1)
        np.testing.assert_allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_donated_cache_is_updated_in_place(rows):
    max_length, kv_heads = 4096, 2
    shapes = [(rows, 1, 4, D), (rows, 1, kv_heads, D), (rows, 1, kv_heads, D)]
    q, k, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    cache = (
        jax.ShapeDtypeStruct((rows, kv_heads, D, max_length), jnp.float32),
        jax.ShapeDtypeStruct((rows, kv_heads, max_length, D), jnp.float32),
    )
    position = jax.ShapeDtypeStruct((rows,), jnp.int32)
    memory = jax.jit(cached_attention, donate_argnums=3).lower(q, k, v, cache, position).compile().memory_analysis()
    held = 4 * rows * kv_heads * D * max_length
    assert memory.alias_size_in_bytes == 2 * held
    assert memory.temp_size_in_bytes < held


@pytest.mark.parametrize("pages", [None, 8], ids=["contiguous", "paged"])
def test_what_lies_behind_the_cache_is_not_written(pages):
    _, k, v = random_call(2, 1, 2, 2, 16)
    new = jnp.full((2, 3, 2, D), 7.0)
    cache, tables = (init_cache(jnp.asarray(k), jnp.asarray(v), 16), None) if pages is None else paged(k, v, pages)
    after = extend_cache(cache, new, new, jnp.asarray([14, 16]), block_tables=tables)
    assert [int((x == 7).sum()) for x in after] == [2 * 2 * D] * 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_that_writes_keys_changes_one_place_of_each_row(dtype):
    rng = np.random.default_rng(0)
    keys, k, v = (rng.normal(size=s) for s in ((5, 2, D, 384), (5, 1, 2, D), (5, 1, 2, D)))
    position = np.array([0, 127, 128, 383, 384])  # the last is behind the cache
    cache = jnp.asarray(keys, dtype), jnp.zeros((5, 2, 384, D), dtype)
    kernel = {"implementation": "pallas_tpu", "interpret": True}
    extend = jax.jit(functools.partial(extend_cache, **kernel))
    found, _ = extend(cache, jnp.asarray(k, dtype), jnp.asarray(v, dtype), jnp.asarray(position))
    expected = np.array(cache[0])
    for row in range(4):
        expected[row, :, :, position[row]] = np.asarray(jnp.asarray(k, dtype))[row, 0]
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("new", "size"), [(1, 128), (3, 128), (5, 256)])
def test_the_kernel_that_writes_keys_into_pages_equals_the_scatter(dtype, new, size):
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(9, 2, D, size)), np.zeros((9, 2, size, D))
    k, v = rng.normal(size=(2, 5, new, 2, D))
    cache = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
    # within a page, at its end and across it, in the last place, and beyond the table
    tables = jnp.asarray([[1, 2], [3, 4], [5, 6], [7, 8], [2, 2]], jnp.int32)
    index = jnp.asarray([0, size - 1, size - 2, 2 * size - new, 2 * size], jnp.int32)
    given = cache, jnp.asarray(k, dtype), jnp.asarray(v, dtype), index
    kernel = jax.jit(functools.partial(extend_cache, implementation="pallas_tpu", interpret=True))
    scatter = jax.jit(functools.partial(extend_cache, implementation="xla"))
    (found, _), (expected, _) = (extend(*given, block_tables=tables) for extend in (kernel, scatter))
    assert (np.asarray(expected) != np.asarray(cache[0])).sum() == 4 * new * 2 * D
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(("new", "length", "says"), [(17, 128, "up to 16 new tokens"), (1, 64, "a multiple of 128")])
def test_the_kernel_that_writes_keys_refuses_what_it_cannot_write(new, length, says):
    cache, k = init_cache(*[jnp.zeros((2, length, 2, D))] * 2, length), jnp.zeros((2, new, 2, D))
    kernel = {"implementation": "pallas_tpu", "interpret": True}
    with pytest.raises(Unavailable, match=says):
        extend_cache(cache, k, k, jnp.zeros(2, jnp.int32), **kernel)


def chunk(lengths, past, size, seed=0):
    """Chunks of sequences with a past in pages, and what whole passes over them say."""
    rng = np.random.default_rng(seed)
    total = [p * size + n for p, n in zip(past, lengths, strict=True)]
    whole = [[rng.normal(size=(1, n, h, D)).astype(np.float32) for h in (4, 2, 2)] for n in total]
    expected = [brute_force(*qkv, [n])[0] for qkv, n in zip(whole, total, strict=True)]
    taken = [-(-n // size) for n in lengths]
    S = sum(taken) * size
    keys, values = map(np.array, init_pages(sum(past) + sum(taken) + 1, size, 2, D, jnp.float32))
    new, segments = [rng.normal(size=(1, S, h, D)).astype(np.float32) for h in (4, 2, 2)], np.zeros((1, S), np.int32)
    page, offset = 1, 0
    pages, past_pages, past_segments = [], [], []
    for number, (p, n, (q, k, v)) in enumerate(zip(past, lengths, whole, strict=True), 1):
        for i in range(p):
            part = slice(i * size, (i + 1) * size)
            keys[page] = k[0, part].transpose(1, 2, 0)
            values[page] = v[0, part].transpose(1, 0, 2)
            past_pages.append(page)
            past_segments += [number] * size
            page += 1
        for x, part in zip(new, (q, k, v), strict=True):
            x[0, offset : offset + n] = part[0, p * size :]
        segments[0, offset : offset + n] = number
        held = -(-n // size)
        pages += range(page, page + held)
        page, offset = page + held, offset + held * size
    tables = [np.asarray([x], np.int32) for x in (pages, past_pages, past_segments)]
    return [*new, segments], (keys, values), tables, expected


@pytest.mark.parametrize(("lengths", "past"), [((5, 20, 1), (2, 0, 3)), ((9, 8), (0, 0))])
def test_chunks_see_themselves_and_their_past_and_nothing_else(lengths, past):
    size = 8
    arrays, cache, tables, expected = chunk(lengths, past, size)
    out, after = jax.jit(chunk_attention)(*arrays, cache, *tables)
    offset = 0
    for p, n, whole in zip(past, lengths, expected, strict=True):
        np.testing.assert_allclose(out[0, offset : offset + n], whole[p * size :], atol=2e-6)
        offset += -(-n // size) * size
    # and the next token of each sequence finds all of them in the pages
    k, _ = read_pages(after, jnp.asarray(tables[0]))
    np.testing.assert_array_equal(k[0], arrays[1][0])


@pytest.mark.parametrize("where", ["chunk", "past"])
def test_a_key_that_is_no_number_reaches_its_own_sequence_and_no_other(where):
    arrays, (keys, values), tables, expected = chunk((5, 6), (2, 1), 8)
    if where == "chunk":
        arrays[1][0, 3] = np.nan
    else:
        values[1, 0, 3] = np.inf
    out, _ = jax.jit(chunk_attention)(*arrays, (keys, values), *tables)
    assert np.isnan(out[0, :5]).all()
    np.testing.assert_allclose(out[0, 8:14], expected[1][8:], atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"lengths": jnp.ones(3, jnp.int32)}, "do not fit 2 sequences"),
        ({"cache": init_cache(jnp.zeros((3, 8, 2, D)), jnp.zeros((3, 8, 2, D)), 8)}, "pages need block_tables"),
        ({"block_tables": jnp.zeros((3, 1), jnp.int32)}, "do not fit 2 sequences"),
        ({"window": 0}, "window must be positive"),
        ({"implementation": "flash"}, "unknown implementation 'flash'"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(changed, says):
    call = {
        "cache": init_cache(jnp.zeros((2, 8, 2, D)), jnp.zeros((2, 8, 2, D)), 8),
        "lengths": jnp.ones(2, jnp.int32),
        **changed,
    }
    # by the shape annotation, which tests check, or else by the function itself
    with pytest.raises((ValueError, TypeError), match=f"{says}|did not match the type annotation|Type-check"):
        decode_attention(jnp.zeros((2, 1, 4, D)), **call)


def test_a_kernel_asked_for_on_the_wrong_device_says_so():
    wrong = "gpu" if jax.default_backend() == "tpu" else "tpu"
    cache = init_cache(jnp.zeros((1, 128, 2, D)), jnp.zeros((1, 128, 2, D)), 128)
    with pytest.raises(Unavailable, match=rf"pallas_{wrong}: runs on \w+, the device here is"):
        decode_attention(jnp.zeros((1, 1, 4, D)), cache, jnp.ones(1, jnp.int32), implementation=f"pallas_{wrong}")


def test_on_cpu_a_sequence_gets_the_same_bits_whatever_is_beside_it_and_however_wide_its_table_is():
    q, k, v = random_call(4, 2, 4, 2, 128)
    cache, tables = paged(k, v, 16)
    lengths = jnp.asarray([128, 17, 60, 0])
    options = options_of("xla_pages")
    together = decode_attention(jnp.asarray(q), cache, lengths, block_tables=tables, **options)
    for b in range(4):
        part = slice(b, b + 1)
        own = tables[part, : -(-int(lengths[b]) // 16) or 1]
        alone = decode_attention(jnp.asarray(q[part]), cache, lengths[part], block_tables=own, **options)
        np.testing.assert_array_equal(alone, together[part])
