"""The Mosaic GPU kernels for Hopper, interpreted: numbers, barriers, races. They take halves and large blocks only."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import Unavailable, segment_attention
from jvlm_kernels.attention import api
from jvlm_kernels.attention.tuning import BlockSizes
from jvlm_kernels.platforms import compiling_for

from tests.kernels import mosaic_interpreter
from tests.kernels.test_segment_attention import attend, brute_force, rows_of, weights_of
from tests.support import with_compiler

NAME = "mosaic_gpu"


def inputs(ids, head_size, heads=2, kv_heads=1, dtype="float16", queries=slice(None)):
    """Normal queries, keys and values for rows of these ids; ``queries`` are a part of the row."""
    rng = np.random.default_rng(0)
    keys = jnp.stack(ids)
    rows, length = keys.shape
    q, k, v = (rng.standard_normal((rows, length, h, head_size)) for h in (heads, kv_heads, kv_heads))
    return *(jnp.asarray(x, dtype) for x in (q[:, queries], k, v)), keys[:, queries], keys


# what is special -> a function that returns inputs and options; few and small, since an interpreted block takes a tenth
# of a second
CASES = {
    "causal, two heads of a group, padding": lambda: (
        inputs([jnp.asarray(np.repeat([1, 2, 0, 3, 0], [90, 50, 9, 40, 11]), jnp.int32)], 40),
        {"causal": True},
    ),
    "bfloat16, a row of padding, no group": lambda: (
        inputs([rows_of([33, 70, 20], 140), rows_of([], 140)], 72, heads=1, dtype="bfloat16"),
        {},
    ),
    "four blocks that need no mask, own scale": lambda: (inputs([rows_of([256], 256)], 64, heads=1), {"scale": 0.3}),
    "causal window": lambda: (inputs([rows_of([180, 20], 200)], 16, heads=1), {"causal": True, "window": 50}),
    "window, four heads of two groups": lambda: (inputs([rows_of([80, 40], 126)], 16, 4, 2), {"window": 17}),
    "a part of the queries of a row": lambda: (
        inputs([rows_of([60, 130], 200), rows_of([180], 200)], 32, heads=1, queries=slice(100, 170)),
        {"causal": True, "q_offset": jnp.asarray([100, 100])},
    ),
    "a promise, segments that fall": lambda: (
        inputs([jnp.asarray(np.repeat([9, 7, 4, 2], [64, 64, 50, 20]), jnp.int32)], 16, heads=1),
        {"max_segment_length": 64},
    ),
    "a head too large for our gradients": lambda: (inputs([rows_of([70, 60], 130)], 136, heads=1), {"causal": True}),
}
# both dtypes, causal and not, an offset; the rest is of the second tier
FAST = (
    "causal, two heads of a group, padding",
    "bfloat16, a row of padding, no group",
    "a part of the queries of a row",
)
every_case = pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)


@functools.cache
def case_of(name):
    return CASES[name]()


@functools.cache
def found_of(case):
    args, options = case_of(case)
    sizes = BlockSizes(128, 128 if "two heads" in case else 64)
    with mosaic_interpreter.extended():
        return jax.tree.map(np.asarray, attend(args, NAME, **options, block_sizes=sizes))


@functools.cache
def expected_of(case):
    args, options = case_of(case)
    return brute_force(*args, **options, weights=weights_of(args))


@every_case
def test_outputs_and_logsumexp_equal_the_brute_force(case):
    out, logsumexp, _ = found_of(case)
    expected, expected_logsumexp, _ = expected_of(case)
    assert (out.dtype, logsumexp.dtype) == (case_of(case)[0][0].dtype, jnp.float32)
    # weights and results are rounded to 11 bits, or 8
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=2e-3 if out.dtype == np.float16 else 2e-2)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=2e-6)


@every_case
def test_gradients_equal_the_brute_force(case):
    for found, expected in zip(found_of(case)[2], expected_of(case)[2], strict=True):
        scale = 1e-3 if found.dtype == np.float16 else 1e-2
        np.testing.assert_allclose(found.astype(np.float64), expected, atol=scale * max(1, np.abs(expected).max()))


@every_case
def test_queries_that_see_nothing_give_zeros_and_neither_take_nor_give_a_gradient(case):
    out, logsumexp, (dq, dk, dv) = found_of(case)
    blind, unseen = ~np.isfinite(expected_of(case)[1]), np.asarray(case_of(case)[0][4]) == 0
    assert (logsumexp[blind] == -np.inf).all()
    for x, where in ((out, blind), (dq, blind), (dk, unseen), (dv, unseen)):
        assert not x[where].any()


def shapes(head_size=64, dtype=jnp.bfloat16, length=512):
    qkv = [jax.ShapeDtypeStruct((1, length, h, head_size), dtype) for h in (4, 2, 2)]
    return *qkv, *[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2


def traced(*args, **options):
    return jax.jit(functools.partial(segment_attention, **options)).trace(*args)


def test_it_runs_for_those_alone_who_name_it():
    spec = api.AttentionSpec(True, None, 1.0, None)
    assert api._OPERATION.runnable(None, False, spec, *shapes()[:3]) == ("pallas_tpu", "pallas_gpu", "xla")
    with compiling_for("cuda"):
        assert api._OPERATION.runnable(NAME, False, spec, *shapes()[:3]) == (NAME,)


@pytest.mark.parametrize(
    ("says", "args", "options"),
    [
        ("takes bfloat16, float16, the same for all; got float32", shapes(dtype=jnp.float32), {}),
        ("a head of 272 does not fit shared memory", shapes(272), {}),
        ("the scale must be positive, not -1.0", shapes(), {"scale": -1.0}),
        ("blocks are of 128 queries", shapes(), {"block_sizes": BlockSizes(64, 64)}),
        ("192 or 256 keys, not", shapes(), {"block_sizes": BlockSizes(128, 320)}),
        ("bytes of shared memory, there are 232448", shapes(256), {"block_sizes": BlockSizes(128, 128)}),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(says, args, options):
    with compiling_for("cuda"), pytest.raises(Unavailable, match=f"{NAME}: .*{says}"):
        traced(*args, implementation=NAME, **options)


def test_without_a_gpu_it_is_refused_unless_one_is_compiled_for():
    with pytest.raises(Unavailable, match="mosaic_gpu: runs on cuda, the device here is "):
        traced(*shapes(), implementation=NAME)


@pytest.mark.parametrize(
    ("capability", "args", "promise", "chosen"),
    [
        ("9.0", shapes(), None, "mosaic_gpu"),
        ("9.0", shapes(80), None, "mosaic_gpu"),
        ("9.0", shapes(), 64, "pallas_gpu"),
        ("9.0", shapes(dtype=jnp.float32), None, "pallas_gpu"),
        ("9.0", shapes(256), None, "pallas_gpu"),
        ("8.0", shapes(), None, "pallas_gpu"),
        ("10.0", shapes(), None, "pallas_gpu"),
        (None, shapes(), None, "pallas_gpu"),
    ],
)
def test_it_is_chosen_by_itself_on_hopper_where_it_is_faster(capability, args, promise, chosen):
    spec = api.AttentionSpec(False, None, 1.0, promise)
    with compiling_for("cuda", capability):
        names = api._OPERATION.runnable(None, False, spec, *args[:3])
    assert [name for name in names if name.endswith("_gpu")] == [chosen]


def test_its_results_vary_over_the_mesh_as_its_operands_do():
    """Else gradients would be summed over devices that hold other rows; `jax.shard_map` checks it when traced."""
    rows = jax.sharding.PartitionSpec("rows")
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("rows",))

    def total(*args):
        out = segment_attention(*args, causal=True, implementation=NAME)
        return jax.lax.psum(out.astype(jnp.float32).sum(), "rows")

    split = jax.shard_map(total, mesh=mesh, in_specs=(rows,) * 5, out_specs=jax.sharding.PartitionSpec())
    with compiling_for("cuda"):
        gradients = jax.eval_shape(jax.grad(split, (0, 1, 2)), *shapes())
    assert [x.shape for x in gradients] == [x.shape for x in shapes()[:3]]


@pytest.mark.slow
def test_all_three_kernels_compile_for_a_gpu_at_real_shapes():
    result = with_compiler("gpu-compiler", "tools/compile_kernels.py", "h200", "--implementation", NAME, "--json")
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 6
    for line in lines:
        names = [kernel["name"] for kernel in line["code"]]
        assert names == ["segment_attention_d_keys", "segment_attention_d_queries", "segment_attention_forward"]
        for kernel in line["code"]:
            assert kernel["threads"] == 384, line
            assert kernel["spilled"] == 0, line
            assert kernel["shared"] <= 227 * 1024, line
            assert kernel["products"].keys() == {"wgmma.mma_async"}, line
