"""`segment_attention` against a brute force in float64 that knows nothing of blocks or masks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jvlm_kernels
import numpy as np
import pytest
from jvlm_kernels import Unavailable, implementations, platforms, segment_attention, segment_attention_gradients
from jvlm_kernels.attention import api, block_pairs, tuning, xla

from tests.support import ROOT, run_python

HEAD = 8
# Dozens of tiny programs: less work for the compiler halves the time. The models' tests compile as everyone does.
_QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def brute_force(
    q, k, v, q_segments, kv_segments, *, causal=False, window=None, scale=None, q_offset=0, weights=None, **_
):
    """One query at a time over the keys it may see.

    Returns (out, logsumexp, (dq, dk, dv)), the gradients of ``sum(out * weights) + sum(logsumexp * weights[..., 0])``.
    """
    q, k, v, q_segments, kv_segments = (np.asarray(x, np.float64) for x in (q, k, v, q_segments, kv_segments))
    B, S, H, D = q.shape
    group, scale = H // k.shape[2], D**-0.5 if scale is None else scale
    weights = np.zeros(q.shape) if weights is None else weights
    out, logsumexp = np.zeros(q.shape), np.full((B, S, H), -np.inf)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    offsets = np.broadcast_to(q_offset, B)
    for b, s in np.ndindex(B, S):
        position = s + offsets[b]
        keys = [
            t
            for t in range(k.shape[1])
            if q_segments[b, s] == kv_segments[b, t] != 0
            and not (causal and t > position)
            and not (window is not None and abs(position - t) >= window)
        ]
        for h in range(H) if keys else ():
            K, V = k[b, keys, h // group], v[b, keys, h // group]
            scores = K @ q[b, s, h] * scale
            p = np.exp(scores - scores.max())
            logsumexp[b, s, h] = np.log(p.sum()) + scores.max()
            p /= p.sum()
            out[b, s, h] = p @ V
            dp = V @ weights[b, s, h]
            ds = p * (dp - p @ dp + weights[b, s, h, 0]) * scale
            dq[b, s, h] = ds @ K
            dk[b, keys, h // group] += np.outer(ds, q[b, s, h])
            dv[b, keys, h // group] += np.outer(p, weights[b, s, h])
    return out, logsumexp, (dq, dk, dv)


def rows_of(lengths, total):
    """Contiguous segment ids of the given lengths, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.pad(ids, (0, total - len(ids))), jnp.int32)


def inputs(S, T=None, heads=4, kv_heads=2, seed=0, lengths=None):
    rng = np.random.default_rng(seed)
    T = S if T is None else T
    sizes = ((S, heads), (T, kv_heads), (T, kv_heads))
    qkv = [jnp.asarray(rng.standard_normal((2, n, h, HEAD)), jnp.float32) for n, h in sizes]
    if T != S:
        return *qkv, *(jnp.asarray(rng.integers(0, 3, (2, n)), jnp.int32) for n in (S, T))
    lengths = lengths or ([S // 3, S // 2], [S // 5] * 4)
    segments = jnp.stack([rows_of(part, S) for part in lengths])
    return *qkv, segments, segments


def with_segments(args, ids):
    return *args[:3], jnp.asarray(ids, jnp.int32), jnp.asarray(ids, jnp.int32)


STRATEGIES = ("dense", "blocked")
BLOCK = 16

# strategy of xla, and what is special -> inputs, options. A dense case has the sizes of a blocked one where it can: all
# other implementations then need one program for both.
CASES = {
    "dense": (inputs(61), {}),
    "dense, causal": (inputs(61), {"causal": True}),
    "dense, one head each": (inputs(50, heads=2, kv_heads=2), {"causal": True}),
    "dense, one key head": (inputs(50, heads=4, kv_heads=1), {}),
    "dense, window": (inputs(40), {"window": 5}),
    "dense, causal window": (inputs(50), {"causal": True, "window": 7}),
    "dense, window of one": (inputs(24), {"window": 1}),
    "dense, own scale": (inputs(40), {"scale": 0.7}),
    "dense, other key length": (inputs(37, T=50), {}),
    "dense, scattered segments": (
        with_segments(inputs(61), np.random.default_rng(5).integers(0, 4, (2, 61))),
        {"causal": True},
    ),
    "one query": (inputs(1, T=30), {}),
    "all padding": (with_segments(inputs(61), np.zeros((2, 61))), {}),
    "blocked, short promise": (
        inputs(60, lengths=([10, 4, 10, 9, 10], [1, 2, 3, 10, 10, 10, 10, 10])),
        {"max_segment_length": 10},
    ),
    "blocked, short causal promise": (
        inputs(60, lengths=([10, 4, 10, 9], [10] * 6)),
        {"max_segment_length": 10, "causal": True},
    ),
    "blocked, promise, not a multiple": (inputs(61, lengths=([7] * 8, [3, 7, 5] * 4)), {"max_segment_length": 7}),
    "blocked, promise, causal window": (
        inputs(60, lengths=([10] * 5, [9] * 6)),
        {"max_segment_length": 10, "causal": True, "window": 4},
    ),
    "blocked, promise, window": (inputs(60, lengths=([10] * 5, [9] * 6)), {"max_segment_length": 10, "window": 4}),
    "promise longer than the row": (inputs(40), {"max_segment_length": 64, "causal": True}),
    "blocked": (inputs(61), {}),
    "blocked, causal": (inputs(61), {"causal": True}),
    "blocked, causal window": (inputs(50), {"causal": True, "window": 7}),
    "blocked, other key length": (inputs(37, T=50), {}),
    "blocked, one head each": (inputs(50, heads=2, kv_heads=2), {"causal": True}),
    "blocked, one key head": (inputs(50, heads=4, kv_heads=1), {}),
    "blocked, many segments": (inputs(61, lengths=([16, 15, 1, 1, 17, 8], [1] * 33)), {"causal": True}),
    "blocked, one long segment": (inputs(61, lengths=([61], [60])), {"causal": True}),
    "blocked, promise": (inputs(64, lengths=([20, 20, 3, 20], [9] * 7)), {"max_segment_length": 20}),
    "blocked, causal promise": (
        inputs(64, lengths=([20, 20, 3, 20], [9] * 7)),
        {"max_segment_length": 20, "causal": True},
    ),
    "blocked, an empty row": (inputs(61, lengths=([61], [])), {"causal": True}),
    "blocked, scattered segments": (
        with_segments(inputs(61), np.random.default_rng(5).integers(0, 4, (2, 61))),
        {"causal": True},
    ),
    "blocked, falling segments": (with_segments(inputs(61), np.arange(121, -1, -1).reshape(2, 61) // 7), {}),
    "blocked, a part of the queries": (inputs(20, T=60), {"causal": True, "q_offset": 30}),
    "blocked, an offset each row": (inputs(20, T=60), {"causal": True, "window": 9, "q_offset": jnp.asarray([40, 3])}),
    "dense, a part of the queries": (inputs(20, T=60), {"causal": True, "q_offset": 30}),
}


PARTED = {
    "dense, causal": (inputs(24), {"causal": True}),
    "blocked, causal window": (inputs(62), {"causal": True, "window": 40}),
    "blocked, window": (inputs(62), {"window": 40}),
}


def weights_of(args):
    """What the gradient tests multiply the outputs with."""
    return np.random.default_rng(1).standard_normal(args[0].shape).astype(np.float32)


@functools.cache
def expected_of(case):
    args, options = CASES[case]
    return brute_force(*args, **options, weights=weights_of(args))


def attend(args, implementation, **options):
    """(out, logsumexp, gradients) in one compilation, and in one for all inputs of the same shapes and options."""
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    static = tuple(sorted((name, value) for name, value in options.items() if name not in arrays))
    (_, (out, logsumexp)), gradients = compiled(implementation, static)(*args, weights_of(args), **arrays)
    return out, logsumexp, gradients


@functools.cache
def compiled(implementation, options):
    """The jitted function of inputs, weights of the outputs, and options that are arrays."""

    def total(q, k, v, q_segments, kv_segments, weights, **arrays):
        out, logsumexp = segment_attention(
            q,
            k,
            v,
            q_segments,
            kv_segments,
            **dict(options),
            **arrays,
            implementation=implementation,
            interpret=implementation.startswith(("pallas", "mosaic")),
            return_logsumexp=True,
        )
        finite = jnp.where(jnp.isfinite(logsumexp), logsumexp, 0.0)
        return (out * weights).sum() + (finite * weights[..., 0]).sum(), (out, logsumexp)

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True), compiler_options=_QUICK)


@functools.cache
def found_of(case, implementation):
    """What a case gives; strategies take over at smaller sizes, and it must be the one the case is named after."""
    args, options = CASES[case]
    wanted = case.split(",")[0]
    settings = {} if wanted != "blocked" and implementation == "xla" else {"block_sizes": small_blocks(args)}
    spec = api.AttentionSpec(
        options.get("causal", False),
        None,
        1.0,
        options.get("max_segment_length"),
        "q_offset" in options,
        block_sizes=settings.get("block_sizes"),
    )
    if implementation == "xla" and wanted in STRATEGIES:
        assert xla._is_dense(spec, *args[:2]) == (wanted == "dense")
    return attend(args, implementation, **options, **settings)


def small_blocks(args):
    """So small that these rows have several; two key heads together where there is one query head each."""
    return tuning.BlockSizes(BLOCK, 2 * BLOCK, 2 if args[0].shape[2] == args[1].shape[2] else 1)


# the rest takes no float32: test_hopper.py
IMPLEMENTATIONS = tuple(name for name in implementations() if name != "mosaic_gpu")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_case = pytest.mark.parametrize(("case", "implementation"), [(c, i) for c in CASES for i in IMPLEMENTATIONS])


@every_case
def test_outputs_and_logsumexp_equal_the_brute_force(case, implementation):
    out, logsumexp, _ = found_of(case, implementation)
    expected, expected_logsumexp, _ = expected_of(case)
    assert (out.dtype, logsumexp.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=2e-6)


@every_case
def test_gradients_equal_the_brute_force(case, implementation):
    for found, expected in zip(found_of(case, implementation)[2], expected_of(case)[2], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@every_case
def test_queries_that_see_nothing_give_zeros_and_neither_take_nor_give_a_gradient(case, implementation):
    out, logsumexp, (dq, dk, dv) = jax.tree.map(np.asarray, found_of(case, implementation))
    blind, unseen = ~np.isfinite(expected_of(case)[1]), np.asarray(CASES[case][0][4]) == 0
    assert not out[blind].any()
    assert (logsumexp[blind] == -np.inf).all()
    assert not dq[blind].any()
    assert not dk[unseen].any()
    assert not dv[unseen].any()


@functools.cache
def whole_of(case):
    """(gradients, (out, logsumexp)) of all keys at once."""
    (q, k, v, q_segments, kv_segments), options = PARTED[case]

    def whole(q, k, v):
        out = segment_attention(q, k, v, q_segments, kv_segments, **options, return_logsumexp=True)
        return (out[0] * weights_of((q,))).sum(), out

    return jax.jit(jax.grad(whole, (0, 1, 2), has_aux=True), compiler_options=_QUICK)(q, k, v)


@every_implementation
@pytest.mark.parametrize("case", PARTED)
def test_gradients_of_two_parts_of_the_keys_are_those_of_all(case, implementation):
    (q, k, v, q_segments, kv_segments), options = PARTED[case]
    pallas = implementation.startswith("pallas")
    blocks = {"block_sizes": small_blocks((q, k))} if case.startswith("blocked") else {}
    d_out = jnp.asarray(weights_of((q,)))
    expected, (out, logsumexp) = whole_of(case)

    @functools.partial(jax.jit, compiler_options=_QUICK)
    def of_part(k, v, kv_segments, q_offset):
        chosen = {**options, **blocks, "q_offset": q_offset, "implementation": implementation, "interpret": pallas}
        return segment_attention_gradients(q, k, v, q_segments, kv_segments, out, logsumexp, d_out, **chosen)

    # parts of one length, so that one program is for both
    half = k.shape[1] // 2
    found = [of_part(k[:, a:b], v[:, a:b], kv_segments[:, a:b], -a) for a, b in ((0, half), (half, 2 * half))]
    np.testing.assert_allclose(found[0][0] + found[1][0], expected[0], atol=1e-5)
    for number in (1, 2):
        joined = jnp.concatenate([found[0][number], found[1][number]], axis=1)
        np.testing.assert_allclose(joined, expected[number], atol=1e-5)


@every_implementation
@pytest.mark.parametrize("case", ["dense, causal", "blocked, short promise"])
def test_bfloat16_inputs_are_summed_in_float32(case, implementation):
    args, options = CASES[case]
    halves = [x.astype(jnp.bfloat16) for x in args[:3]]
    out, logsumexp, _ = attend([*halves, *args[3:]], implementation, **options)
    expected, expected_logsumexp, _ = brute_force(*(np.asarray(x, np.float32) for x in halves), *args[3:], **options)
    assert (out.dtype, logsumexp.dtype) == (jnp.bfloat16, jnp.float32)
    # results and softmax weights are rounded to 8 bits, scores are not
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-2)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=2e-2)


@every_implementation
def test_large_scores_do_not_overflow(implementation):
    q, k, v, *segments = inputs(16)
    args = (1e3 * q, 1e3 * k, v, *segments)
    out, logsumexp, _ = attend(args, implementation)
    expected = brute_force(*args)
    np.testing.assert_allclose(out, expected[0], atol=1e-3)
    np.testing.assert_allclose(logsumexp, expected[1], rtol=1e-5)


def test_the_memory_of_long_rows_follows_their_length_not_its_square():
    """Compiled, not run: temporary memory of forward and backward at twice the length."""

    def temporary(S):
        def loss(q, k, v, segments):
            return segment_attention(q, k, v, segments, segments, causal=True).sum()

        shapes = [jax.ShapeDtypeStruct((1, S, h, 64), jnp.float32) for h in (4, 2, 2)]
        ids = jax.ShapeDtypeStruct((1, S), jnp.int32)
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096)


def chosen_block(ids, **promise):
    """The size of the blocks that a call with these segments gets on CPU."""
    spec = api.AttentionSpec(True, None, 1.0, promise.get("max_segment_length"))

    def size(plan, spec, *operands):
        return jnp.asarray(plan.block_q)

    q = jnp.zeros((*ids.shape, 4, HEAD))
    return int(xla._in_blocks(size, spec, q, q, q, ids, ids, jnp.zeros(len(ids), jnp.int32)))


@pytest.mark.parametrize(("length", "size"), [(100, 64), (180, 64), (4096, 256)])
def test_blocks_are_small_where_segments_are_short(length, size):
    assert chosen_block(rows_of([length] * (4096 // length), 4096)[None]) == size


def windows_of(rows, columns):
    """Patches of each 8 x 8 window of an image of so many patches; those at its edges are smaller."""
    sides = ([min(8, n - at) for at in range(0, n, 8)] for n in (rows, columns))
    return [h * w for h, w in itertools.product(*sides)]


@pytest.mark.parametrize("causal", [False, True], ids=["windows of images", "conversations"])
def test_blocks_on_cpu_hold_at_most_two_and_a_half_times_the_pairs_that_are_visible(causal):
    rng = np.random.default_rng(0)
    if causal:  # of 40 to 360 tokens
        lengths, promise = rng.integers(40, 360, 30).tolist(), {}
        visible = sum(n * (n + 1) // 2 for n in lengths)
    else:  # images of 84 to 336 pixels a side
        images = 2 * rng.integers(3, 13, (30, 2))
        lengths, promise = [n for h, w in images for n in windows_of(h, w)], {"max_segment_length": 64}
        visible = sum(n * n for n in lengths)
    ids = rows_of(lengths, -(-sum(lengths) // 128) * 128)[None]
    size = chosen_block(ids, **promise)
    spec = api.AttentionSpec(causal, None, 1.0, None)
    needed, _ = block_pairs.block_mask(spec, ids, ids, jnp.zeros(1, jnp.int32), size, size)
    assert int(needed.sum()) * size**2 < 2.5 * visible


def test_blocks_of_either_size_give_the_same():
    args = inputs(1024, lengths=([90] * 11, [1000]))
    small, large = (attend(args, "xla", causal=True, block_sizes=tuning.BlockSizes(n, n)) for n in (64, 256))
    chosen = attend(args, "xla", causal=True)
    for one in (small, large):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, chosen)


GOOD = [np.zeros((1, 8, h, HEAD), np.float32) for h in (4, 2, 2)] + [np.ones((1, 8), np.int32)] * 2


def changed(**arguments):
    args = list(GOOD)
    for name, value in arguments.items():
        args["q k v q_segments kv_segments".split().index(name)] = value
    return [jnp.asarray(a) for a in args]


REFUSED = {
    "an unknown implementation": (
        changed(),
        {"implementation": "flash"},
        "unknown implementation .flash.; known: pallas_tpu",
    ),
    "heads that do not divide": (
        changed(q=np.zeros((1, 8, 3, HEAD), np.float32)),
        {},
        "3 query heads are not a multiple of 2",
    ),
    "another head size": (changed(q=np.zeros((1, 8, 4, 4), np.float32)), {}, "do not fit together"),
    "segments of another length": (changed(q_segments=np.ones((1, 7), np.int32)), {}, "do not fit"),
    "causal with other key length": (
        changed(q=np.zeros((1, 4, 4, HEAD), np.float32), q_segments=np.ones((1, 4), np.int32)),
        {"causal": True},
        "causal attention needs equal lengths or a q_offset, got S=4 and T=8",
    ),
    "a promise with other key length": (
        changed(q=np.zeros((1, 4, 4, HEAD), np.float32), q_segments=np.ones((1, 4), np.int32)),
        {"max_segment_length": 4},
        "max_segment_length needs queries and keys of the same sequence",
    ),
    "a window of nothing": (changed(), {"window": 0}, "window must be positive, got 0"),
    "a promise of nothing": (changed(), {"max_segment_length": 0}, "max_segment_length must be positive, got 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_call_that_makes_no_sense_is_refused(kind):
    args, options, says = REFUSED[kind]
    # the shape annotations, checked in tests only, may be the first to object
    with pytest.raises((ValueError, TypeError), match=says if "do not fit" not in says else None):
        segment_attention(*args, **options)


def test_when_nothing_can_run_every_reason_is_given(monkeypatch):
    def unable(name):
        def check(*_):
            raise Unavailable(f"{name} has its reasons")

        return check

    for name in implementations():
        module = platforms.load(api._OPERATION.modules[name])
        monkeypatch.setattr(module, "check", unable(name))
    with pytest.raises(Unavailable, match=r"xla: xla has its reasons; reference: reference has its reasons"):
        segment_attention(*changed())
    with pytest.raises(Unavailable, match=r"call: reference: reference has its reasons$"):
        segment_attention(*changed(), implementation="reference")


def test_the_next_implementation_is_taken_when_the_first_cannot_run(monkeypatch):
    def check(*_):
        raise Unavailable("not today")

    monkeypatch.setattr(xla, "check", check)
    args = inputs(16)
    np.testing.assert_allclose(segment_attention(*args), brute_force(*args)[0], atol=2e-6)


def test_our_folder_of_kernels_is_not_taken_for_the_package_of_that_name():
    """transformers probes for a package called kernels, from the repository's root too."""
    assert ROOT.joinpath("kernels").is_dir()
    assert jvlm_kernels.__name__ == "jvlm_kernels"
    run_python("from transformers.utils import is_kernels_available; assert not is_kernels_available()")
