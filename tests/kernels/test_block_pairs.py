"""Random packings: which pairs of blocks are computed, and that the result is right whatever the sequence holds."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import reference_attention, segment_attention
from jvlm_kernels.attention import api, block_pairs, tuning

S, BLOCK_Q, BLOCK_KV = 96, 16, 32
KERNELS = ("xla", "pallas_tpu", "pallas_gpu")
settings = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def packings(draw, total=S):
    """Ids of a sequence: segments of any length, one of 0 now and then, ids that skip numbers, padding at the end."""
    ids, number = [], 0
    for length in draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 15, 16, 17, 31, 32, 33, 60, total]), max_size=12)):
        number += draw(st.integers(1, 3))
        ids += [number] * length
    return np.asarray(ids[:total] + [0] * (total - len(ids)), np.int32)


def visible_scores(q_ids, kv_ids, causal, window):
    distance = np.arange(len(q_ids))[:, None] - np.arange(len(kv_ids))
    pairs = (q_ids[:, None] == kv_ids) & (q_ids[:, None] > 0)
    if causal:
        pairs &= distance >= 0
    if window is not None:
        pairs &= np.abs(distance) < window
    return pairs


def in_blocks(pairs, how):
    N, M = -(-pairs.shape[0] // BLOCK_Q), -(-pairs.shape[1] // BLOCK_KV)
    full = np.zeros((N * BLOCK_Q, M * BLOCK_KV), bool)
    full[: pairs.shape[0], : pairs.shape[1]] = pairs
    return how(how(full.reshape(N, BLOCK_Q, M, BLOCK_KV), axis=3), axis=1)


def block_mask(q_ids, kv_ids, causal, window):
    spec = api.AttentionSpec(causal, window, 1.0, None)
    ids = jnp.asarray(q_ids)[None], jnp.asarray(kv_ids)[None]
    needed, full = block_pairs.block_mask(spec, *ids, jnp.zeros(1, jnp.int32), BLOCK_Q, BLOCK_KV)
    return np.asarray(needed[0]), np.asarray(full[0])


@settings
@hypothesis.given(packings(), st.booleans(), st.sampled_from([None, 1, 20]))
def test_needed_blocks_of_a_packed_sequence_are_those_with_a_visible_score(ids, causal, window):
    needed, full = block_mask(ids, ids, causal, window)
    scores = visible_scores(ids, ids, causal, window)
    expected = in_blocks(scores, np.any)
    assert (needed >= expected).all()
    if window is None:  # at the edge of a window, a segment may end on the way
        np.testing.assert_array_equal(needed, expected)
    assert (full <= in_blocks(scores, np.all)).all()


@settings
@hypothesis.given(st.lists(st.integers(-1, 6), min_size=S, max_size=S), packings(), st.booleans())
def test_no_block_with_a_visible_score_is_left_out_for_ids_in_any_order(q_ids, kv_ids, causal):
    q_ids = np.asarray(q_ids, np.int32)
    needed, full = block_mask(q_ids, kv_ids, causal, None)
    scores = visible_scores(q_ids, kv_ids, causal, None)
    assert (needed >= in_blocks(scores, np.any)).all()
    assert (full <= in_blocks(scores, np.all)).all()


@settings
@hypothesis.given(packings(), packings(), st.booleans(), st.booleans())
def test_the_work_items_are_the_pairs_of_the_block_mask(first, second, causal, cover_empty_rows):
    spec = api.AttentionSpec(causal, None, 1.0, None)
    ids = jnp.asarray(np.stack([first, second]))
    mask = block_pairs.block_mask(spec, ids, ids, jnp.zeros(2, jnp.int32), BLOCK_Q, BLOCK_KV)
    size = 2 * block_pairs.max_pairs(spec, S, S, BLOCK_Q, BLOCK_KV)
    for needed, full in (mask, block_pairs.transpose(mask)):
        pairs = block_pairs.list_pairs(needed, full, size, cover_empty_rows=cover_empty_rows)
        needed, full = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (needed, full))
        items = np.asarray(pairs.items)[: int(pairs.count)]
        computed = np.zeros_like(needed)
        is_full, is_partial = (np.asarray(f(items)) for f in (block_pairs.is_full, block_pairs.is_partial))
        row, column = np.asarray(block_pairs.block_row(items)), np.asarray(block_pairs.block_column(items))
        real = is_full | is_partial
        computed[row[real], column[real]] = True
        np.testing.assert_array_equal(computed, needed)
        np.testing.assert_array_equal(is_full[real], full[row[real], column[real]])
        assert (np.diff(row) >= 0).all()
        np.testing.assert_array_equal(np.asarray(block_pairs.is_first(items)), np.diff(row, prepend=-1) > 0)
        np.testing.assert_array_equal(np.asarray(block_pairs.is_last(items)), np.diff(row, append=len(needed)) > 0)
        listed = np.arange(len(needed)) if cover_empty_rows else np.flatnonzero(needed.any(1))
        np.testing.assert_array_equal(np.unique(row), listed)


# so small that these sequences have several
BLOCK_SIZES = tuning.BlockSizes(BLOCK_Q, BLOCK_KV)


@functools.partial(jax.jit, static_argnames=("implementation", "causal"))
def attend(q, k, v, weights, segments, *, implementation, causal):
    """(out, logsumexp, gradients)."""

    def total(q, k, v):
        if implementation == "oracle":
            out, logsumexp = reference_attention(q, k, v, segments, segments, causal=causal)
        else:
            out, logsumexp = segment_attention(
                q,
                k,
                v,
                segments,
                segments,
                causal=causal,
                implementation=implementation,
                interpret=implementation.startswith("pallas"),
                return_logsumexp=True,
                block_sizes=BLOCK_SIZES,
            )
        seen = jnp.isfinite(logsumexp)
        return (out * weights).sum() + jnp.where(seen, logsumexp * weights[..., 0], 0.0).sum(), (out, logsumexp)

    gradients, outputs = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return outputs, gradients


def operands(heads, kv_heads, head_size, dtype=jnp.float32, rows=1, length=S):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, h, head_size) for h in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def same(found, expected, tolerance):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = (np.nan_to_num(np.asarray(x, np.float32), neginf=-1e9) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
def test_any_packing_gives_what_the_reference_gives(implementation, causal):
    call = operands(4, 2, 16)

    @settings
    @hypothesis.given(packings())
    def check(ids):
        segments = jnp.asarray(ids)[None]
        expected = attend(*call, segments, implementation="oracle", causal=causal)
        same(attend(*call, segments, implementation=implementation, causal=causal), expected, 2e-5)

    check()


HEADS = [
    (64, 2, 2, "bfloat16"),
    (72, 2, 2, "float32"),
    (80, 4, 2, "bfloat16"),
    (96, 4, 1, "float32"),
    (128, 8, 2, "bfloat16"),
    (128, 8, 2, "float32"),
    (24, 3, 3, "bfloat16"),
    (160, 2, 1, "float32"),
]
# XLA's own products take any head size; a Pallas kernel pads what its blocks do not fit
OF_XLA = [(80, 4, 2, "bfloat16"), (96, 4, 1, "float32")]


@pytest.mark.parametrize(
    ("head_size", "heads", "kv_heads", "dtype", "implementation"),
    [(*heads, name) for name in KERNELS for heads in (OF_XLA if name == "xla" else HEADS)],
)
def test_every_head_size_and_group(head_size, heads, kv_heads, dtype, implementation):
    length = 40
    call = operands(heads, kv_heads, head_size, dtype, length=length)
    ids = jnp.asarray(np.repeat([1, 2, 3, 0], [17, 1, 19, 3]))[None]
    expected = attend(*(x.astype(jnp.float32) for x in call), ids, implementation="oracle", causal=True)
    found = attend(*call, ids, implementation=implementation, causal=True)
    assert {x.dtype for x in found[1]} == {jnp.dtype(dtype)}
    same(found, expected, 3e-5 if dtype == "float32" else 6e-2)


@pytest.mark.parametrize("implementation", KERNELS)
def test_vmap_equals_a_larger_batch(implementation):
    call = [jnp.stack([x, 2 * x, -x]) for x in operands(2, 1, 16, rows=2, length=48)]
    ids = np.repeat([[1, 2, 0], [3, 4, 5]], [20, 20, 8], axis=1)
    segments = jnp.asarray(np.stack([ids, ids[::-1], np.minimum(ids, 3)]), jnp.int32)
    run = functools.partial(attend, implementation=implementation, causal=True)
    same(jax.vmap(run)(*call, segments), jax.tree.map(lambda *x: jnp.stack(x), *map(run, *call, segments)), 2e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_policy_can_keep_the_output_so_that_there_is_no_second_forward_pass(implementation):
    q, k, v, weights = operands(2, 1, 16, length=48)
    ids = jnp.ones((1, 48), jnp.int32)

    def count(policy):
        def block(q):
            kwargs = {"implementation": implementation, "interpret": implementation.startswith("pallas")}
            out = segment_attention(jnp.sin(q), k, v, ids, ids, causal=True, **kwargs)
            return (jnp.cos(out) * weights).sum()

        text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(block, policy=policy)))(q))
        return text.count("custom_vmap_call[")  # an implementation, in whichever direction

    names = jax.checkpoint_policies.save_only_these_names(api.OUT_NAME, api.LOGSUMEXP_NAME)
    assert (count(jax.checkpoint_policies.nothing_saveable), count(names)) == (3, 2)
