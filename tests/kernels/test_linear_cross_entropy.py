"""`linear_cross_entropy` and its sum against plain logits in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import linear_cross_entropy, linear_cross_entropy_sum
from jvlm_kernels.cross_entropy import summed

N, D, V = 24, 8, 50


def call(seed=0, vocabulary_first=False):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((V, D) if vocabulary_first else (D, V)).astype(np.float32)
    targets = rng.integers(0, V, N).astype(np.int32)
    targets[3] = -100
    weights = rng.uniform(0.5, 2, N).astype(np.float32)
    weights[7] = 0
    return tuple(map(jnp.asarray, (rng.standard_normal((N, D)).astype(np.float32), kernel, targets, weights)))


def plain(hidden, kernel, targets, weights, vocabulary_first=False, z_loss=0.0, d_loss=None, d_logsumexp=None):
    """((loss, logsumexp, correct), (d_hidden, d_kernel, d_weights)) written out."""
    hidden, kernel, targets, weights = (np.asarray(x) for x in (hidden, kernel, targets, weights))
    hidden, kernel = np.float64(hidden), np.float64(kernel.T if vocabulary_first else kernel)
    weights = np.where(targets == -100, 0.0, np.float64(weights))
    supervised, rows = weights != 0, np.arange(len(targets))
    words = np.where(targets == -100, 0, targets)
    logits = hidden @ kernel
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    unweighted = total - logits[rows, words] + z_loss * total**2
    outputs = weights * unweighted, np.where(supervised, total, 0), supervised & (logits.argmax(-1) == words)
    p = np.exp(logits - total[:, None])
    one_hot = np.eye(kernel.shape[1])[words]
    d_logits = (d_loss * weights)[:, None] * (p * (1 + 2 * z_loss * total[:, None]) - one_hot)
    d_logits += (d_logsumexp * supervised)[:, None] * p
    d_kernel = hidden.T @ d_logits
    gradients = d_logits @ kernel.T, d_kernel.T if vocabulary_first else d_kernel, d_loss * unweighted * supervised
    return outputs, gradients


@pytest.mark.parametrize("vocabulary_first", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("block", [None, 50, 25, 16, 7, 1])
def test_loss_and_gradients_equal_plain_logits(block, z_loss, vocabulary_first):
    hidden, kernel, targets, weights = call(vocabulary_first=vocabulary_first)
    rng = np.random.default_rng(1)
    d_loss, d_logsumexp = rng.standard_normal((2, N)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def total(hidden, kernel, weights):
        found = linear_cross_entropy(
            hidden, kernel, targets, weights, vocabulary_first=vocabulary_first, z_loss=z_loss, block=block
        )
        return (found.loss * d_loss).sum() + (found.logsumexp * d_logsumexp).sum(), found

    gradients, found = total(hidden, kernel, weights)
    outputs, expected = plain(
        hidden, kernel, targets, weights, vocabulary_first, z_loss, np.float64(d_loss), np.float64(d_logsumexp)
    )
    for ours, theirs in zip(found, outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def temporary(loss, **options):
    """Bytes of temporary memory of a loss and its gradients, compiled and not run; [2048, 65536] logits."""
    shapes = [((2048, 64), jnp.float32), ((64, 1 << 16), jnp.float32), ((2048,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    compiled = jax.jit(jax.grad(lambda *x: loss(*x, **options).loss.sum(), (0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


ALL_LOGITS = 4 * 2048 * (1 << 16)


def test_memory_follows_the_block_not_the_vocabulary():
    assert temporary(linear_cross_entropy, block=1 << 16) >= ALL_LOGITS
    assert temporary(linear_cross_entropy, block=2048) < ALL_LOGITS / 8
    assert temporary(linear_cross_entropy) < ALL_LOGITS / 2


def test_memory_of_the_sum_follows_the_block_not_the_tokens():
    assert temporary(linear_cross_entropy_sum, block=2048) >= ALL_LOGITS
    assert temporary(linear_cross_entropy_sum, block=128) < ALL_LOGITS / 8
    assert temporary(linear_cross_entropy_sum) < ALL_LOGITS / 2


@pytest.mark.parametrize("vocabulary_first", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("supervised", [None, 12, 0])
@pytest.mark.parametrize("block", [None, 24, 100, 8, 7, 1])
def test_the_sum_and_its_gradients_equal_plain_logits(block, supervised, z_loss, vocabulary_first):
    hidden, kernel, targets, weights = call(vocabulary_first=vocabulary_first)
    if supervised is not None:
        weights = weights.at[np.random.default_rng(2).permutation(N)[supervised:]].set(0)
    # unsupervised tokens may hold anything
    unread = jnp.where(((weights == 0) | (targets == -100))[:, None], jnp.nan, hidden)
    value, gradient = summed_of(block, z_loss, vocabulary_first)
    (_, found), gradients = gradient(unread, kernel, weights, targets)
    outputs, expected = plain(hidden, kernel, targets, weights, vocabulary_first, z_loss, 3 * np.ones(N), np.zeros(N))
    np.testing.assert_allclose(found.loss, outputs[0].sum(), rtol=2e-5)
    assert found.correct == outputs[2].sum()
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(value(unread, kernel, weights, targets)[1].loss, found.loss, rtol=1e-6)


@functools.cache
def summed_of(block, z_loss, vocabulary_first):
    """Three times the sum, alone and with its gradients, each compiled once for all inputs."""

    def total(hidden, kernel, weights, targets):
        found = linear_cross_entropy_sum(
            hidden, kernel, targets, weights, vocabulary_first=vocabulary_first, z_loss=z_loss, block=block
        )
        return 3.0 * found.loss, found

    return jax.jit(total), jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))


def test_groups_of_tokens_have_sums_of_their_own_and_change_neither_loss_nor_gradient():
    hidden, kernel, targets, weights = call()
    groups = np.random.default_rng(3).integers(-1, 4, N)  # of -1 and 3 there are no sums

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def total(hidden, kernel, weights, **options):
        found = linear_cross_entropy_sum(hidden, kernel, targets, weights, block=8, **options)
        return found.loss, found

    (loss, found), gradients = total(hidden, kernel, weights, groups=jnp.asarray(groups), num_groups=3)
    (expected_loss, without), expected = total(hidden, kernel, weights)
    assert without.by_group is None
    losses, _, correct = plain(hidden, kernel, targets, weights, d_loss=np.ones(N), d_logsumexp=np.zeros(N))[0]
    for group in range(3):
        inside = groups == group
        assert inside.any()
        np.testing.assert_allclose(found.by_group[group], [losses[inside].sum(), correct[inside].sum()], rtol=2e-5)
    for ours, theirs in zip((loss, *gradients), (expected_loss, *expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_sum_computes_only_the_supervised_tokens(monkeypatch):
    """The loop runs in Python here, so that its blocks can be counted."""
    hidden, kernel, targets, _ = call()
    computed = []

    def counted(spec, hidden, *arguments, of=summed._block):
        computed.append(len(hidden))
        return of(spec, hidden, *arguments)

    monkeypatch.setattr(summed, "_block", counted)
    for supervised, blocks in ((0, 0), (1, 1), (4, 1), (5, 2), (23, 6)):
        computed.clear()
        weights = jnp.zeros(N).at[np.random.default_rng(supervised).permutation(N)[:supervised]].set(1)
        with jax.disable_jit():
            jax.grad(lambda h, w=weights: linear_cross_entropy_sum(h, kernel, jnp.abs(targets), w, block=4).loss)(
                hidden
            )
        assert computed == [4] * blocks


def test_a_frozen_kernel_costs_no_gradient():
    """Compiled: three products of the size of the logits, one fewer where one of the gradients is not asked for."""
    arguments = call()

    def products(which):
        def loss(hidden, kernel, targets, weights):
            return linear_cross_entropy_sum(hidden, kernel, targets, weights, block=8).loss

        text = jax.jit(jax.grad(loss, which)).lower(*arguments).compile().as_text()
        return len(re.findall(r" dot\(", text))

    assert (products((0, 1)), products(0), products(1)) == (3, 2, 2)


def test_equal_logits_count_as_argmax_counts_them():
    targets = jnp.array([0, 1, 2, 0])
    hidden, kernel = jnp.ones((4, 2)), jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    sums, each = (jax.jit(f)(hidden, kernel, targets) for f in (linear_cross_entropy_sum, linear_cross_entropy))
    assert sums.correct == each.correct.sum() == 2


def test_bfloat16_products_are_summed_in_float32_and_the_kernel_keeps_its_dtype():
    hidden, kernel, targets, weights = call()
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    run = jax.jit(jax.grad(lambda h, k: linear_cross_entropy(h, k, targets, weights).loss.sum(), (0, 1)))
    d_hidden, d_kernel = run(narrow, kernel)
    assert (d_hidden.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    zero = np.zeros(N)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, kernel)]
    _, expected = plain(*rounded, targets, weights, d_loss=zero + 1, d_logsumexp=zero)
    np.testing.assert_allclose(d_kernel, expected[1], atol=5e-2)
    run = jax.jit(jax.grad(lambda h, k: linear_cross_entropy_sum(h, k, targets, weights, block=4).loss, (0, 1)))
    d_hidden, d_kernel = run(narrow, kernel)
    assert (d_hidden.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(d_kernel, expected[1], atol=5e-2)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_sum])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kernel": np.zeros((D + 1, V), np.float32)}, "do not fit"),
        ({"targets": np.zeros(N - 1, np.int32)}, "do not fit"),
        ({"block": 0}, "block must be positive"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(function, changed, says):
    hidden, kernel, targets, weights = call()
    arguments = {"hidden": hidden, "kernel": kernel, "targets": targets, "weights": weights, **changed}
    # the shape annotations, checked in tests only, may be the first to object
    with pytest.raises((ValueError, TypeError), match=f"{says}|did not match the type annotation|Type-check"):
        function(**{k: jnp.asarray(v) if k != "block" else v for k, v in arguments.items()})
