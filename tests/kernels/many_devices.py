"""Run by test_sharding.py in a process of its own with several CPU devices: kernels inside `jax.shard_map`."""

import functools
import json
import math
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jvlm_kernels import linear_cross_entropy, linear_cross_entropy_sum, reference_attention, segment_attention


def attention_over_rows_and_heads(implementation):
    """Each device has its own rows and heads."""
    _over_rows_and_heads(implementation, 64)
    if implementation == "xla":
        _over_rows_and_heads(implementation, 300)  # rows of a length that XLA's attention walks in blocks


def _over_rows_and_heads(implementation, length):
    mesh = _mesh(data=2, model=2)
    q, k, v, segments, weights = _packed_sequence(B=2, S=length)
    split = P("data", None, "model")

    @_sharded(implementation, mesh=mesh, in_specs=(split, split, split, P("data")), out_specs=split)
    def part(q, k, v, segments):
        return segment_attention(q, k, v, segments, segments, causal=True, **_options(implementation))

    _compare(lambda q, k, v: part(q, k, v, segments), q, k, v, segments, weights)


def context_parallelism(implementation):
    """Each device has a part of the row's queries; keys of the others arrive with their own segment ids."""
    mesh = _mesh(context=4)
    q, k, v, segments, weights = _packed_sequence(B=2, S=128)
    split = P(None, "context")

    @_sharded(implementation, mesh=mesh, in_specs=(split, split, split, split), out_specs=split)
    def part(q, k, v, segments):
        gather = functools.partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
        return segment_attention(
            q,
            gather(k),
            gather(v),
            segments,
            gather(segments),
            causal=True,
            q_offset=jax.lax.axis_index("context") * q.shape[1],
            **_options(implementation),
        )

    _compare(lambda q, k, v: part(q, k, v, segments), q, k, v, segments, weights)


def ring(implementation):
    """Keys travel around; each part is attended to on its own and put together by its logsumexp."""
    count = 4
    mesh = _mesh(context=count)
    q, k, v, segments, weights = _packed_sequence(B=1, S=128)
    split = P(None, "context")

    @_sharded(implementation, mesh=mesh, in_specs=(split, split, split, split), out_specs=split)
    def part(q, k, v, segments):
        rank, length = jax.lax.axis_index("context"), q.shape[1]
        outs, sums = [], []
        keys = (k, v, segments)
        for turn in range(count):
            owner = (rank - turn) % count
            out, logsumexp = segment_attention(
                q,
                keys[0],
                keys[1],
                segments,
                keys[2],
                causal=True,
                q_offset=(rank - owner) * length,
                return_logsumexp=True,
                **_options(implementation),
            )
            outs.append(out)
            sums.append(logsumexp)
            keys = jax.lax.ppermute(keys, "context", [(i, (i + 1) % count) for i in range(count)])
        share = jnp.stack(sums)
        top = share.max(0)
        share = jnp.where(jnp.isfinite(share), jnp.exp(share - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
        total = share.sum(0)
        return (jnp.stack(outs) * share[..., None]).sum(0) / jnp.where(total > 0, total, 1.0)[..., None]

    _compare(lambda q, k, v: part(q, k, v, segments), q, k, v, segments, weights)


def split_vocabulary(_):
    """Each device has a part of the vocabulary, as columns or as rows."""
    N, D, V = 24, 8, 50
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((N, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, N)).at[3].set(-100)
    mesh = _mesh(model=2)
    for vocabulary_first in (False, True):
        kernel = jnp.asarray(rng.standard_normal((V, D) if vocabulary_first else (D, V)), jnp.float32)
        split = P("model") if vocabulary_first else P(None, "model")
        for block in (None, 7):
            settings = {"vocabulary_first": vocabulary_first, "z_loss": 0.1, "block": block}

            @jax.shard_map(mesh=mesh, in_specs=(P(), split), out_specs=P())
            def part(hidden, kernel, settings=settings):
                return linear_cross_entropy(hidden, kernel, targets, axis_name="model", **settings)

            def total(hidden, kernel, compute):
                found = compute(hidden, kernel)
                return found.loss.sum() + 0.1 * found.logsumexp.sum(), found

            def whole(hidden, kernel, settings=settings):
                return linear_cross_entropy(hidden, kernel, targets, **settings)

            expected, found = (
                jax.jit(jax.grad(functools.partial(total, compute=c), (0, 1), has_aux=True))(hidden, kernel)
                for c in (whole, part)
            )
            for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=2e-5)


def split_tokens_and_vocabulary(_):
    """Parts of the vocabulary on two devices, tokens on two, one of which has nothing to learn in all but one block."""
    N, D, V = 24, 8, 50
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((N, D), (D, V)))
    targets = jnp.asarray(rng.integers(0, V, N))
    weights = jnp.ones(N).at[1 : N // 2].set(0)
    tokens = P("data")

    @jax.shard_map(mesh=_mesh(data=2, model=2), in_specs=(tokens, P(None, "model"), tokens, tokens), out_specs=P())
    def part(hidden, kernel, targets, weights):
        kernel = jax.lax.pcast(kernel, ("data",), to="varying")
        found = linear_cross_entropy_sum(hidden, kernel, targets, weights, axis_name="model", z_loss=0.1, block=4)
        return jax.lax.psum(found, "data")

    def whole(hidden, kernel, targets, weights):
        return linear_cross_entropy_sum(hidden, kernel, targets, weights, z_loss=0.1, block=24)

    def gradients(function):
        run = jax.grad(lambda *x: function(*x)[0], (0, 1, 3))
        return jax.jit(run)(hidden, kernel, targets, weights), function(hidden, kernel, targets, weights)

    for ours, theirs in zip(*(jax.tree.leaves(gradients(f)) for f in (part, whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def _mesh(**axes):
    count, kind = math.prod(axes.values()), (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kind, devices=jax.devices()[:count])


def _sharded(implementation, **specs):
    # JAX's interpreter of kernels cannot tell which values vary over the mesh; its compilers can (test_compile.py)
    return functools.partial(jax.shard_map, check_vma=not implementation.startswith("pallas"), **specs)


def _options(implementation):
    return {"implementation": implementation, "interpret": implementation.startswith("pallas")}


def _packed_sequence(B, S):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, S, h, 16)), jnp.float32) for h in (4, 2, 2))
    cuts = np.sort(rng.choice(np.arange(1, S - 5), (B, 5), replace=False), axis=1)
    segments = (np.arange(S) >= cuts[..., None]).sum(1) + 1
    segments[:, S - 5 :] = 0
    return q, k, v, jnp.asarray(segments, jnp.int32), jnp.asarray(rng.standard_normal(q.shape), jnp.float32)


def _compare(compute, q, k, v, segments, weights):
    def of(function):
        return jax.jit(jax.value_and_grad(lambda *x: (function(*x) * weights).sum(), (0, 1, 2)))(q, k, v)

    expected = of(lambda q, k, v: reference_attention(q, k, v, segments, segments, causal=True)[0])
    for ours, theirs in zip(jax.tree.leaves(of(compute)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def main(pairs):
    """Write one JSON line for each "case implementation": the two, and the traceback of what failed or None."""
    for pair in pairs:
        case, implementation = pair.split()
        error = None
        try:
            globals()[case](implementation)
        except (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError):
            error = traceback.format_exc()
        print(json.dumps([case, implementation, error]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
