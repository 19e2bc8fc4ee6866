"""What stands beside a frozen matrix while a model runs: two small matrices, and what DoRA adds to them.

Axes: i inputs, o outputs, r rank, B sequences; kernels are [i, o] and may have leading axes for layers and experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from jvlm_kernels import platforms

from jvlm.models import device_ops, layers
from jvlm.models.decoders.moe import ExpertPairs

RANK = "rank"  # logical axis, which no mesh splits


class AdapterParam(nnx.Param):
    """A variable of an adapter; `jvlm.models.vlm.parameters` leaves it out."""


class AdapterConstant(AdapterParam):
    """A variable of an adapter that is never trained: a scale, a row number, what a decomposition began with."""


def is_adapter_path(path: str) -> bool:
    """Return whether the dotted path of a variable is that of an adapter's."""
    return any(f".{part}." in path for part in ("adapter", "token_rows", "head_rows"))


class StepValue(nnx.Variable):
    """What one step derives from the parameters or draws, and no checkpoint holds: see `prepare` in `steps`."""


def kept(key: PRNGKeyArray, share: float, shape: tuple[int, ...]) -> Bool[Array, "*L"]:
    """Return a mask of which a share is true: each element follows from the key and its place alone, on every mesh.

    Random numbers are drawn for rows and columns, and the sum of both is hashed (the finaliser of MurmurHash3): eight
    operations for an element, where threefry needs about a hundred.
    """
    of_rows, of_columns = jax.random.split(key)
    bits = jax.random.bits(of_rows, shape[:-1])[..., None] + jax.random.bits(of_columns, shape[-1:])
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)) < jnp.uint32(round(share * 2**32))


class LowRankAdapter(nnx.Module):
    """``x -> y + scale * x a b`` beside a product ``y = x kernel``; LoRA, arXiv 2106.09685.

    With a magnitude the columns of the adapted matrix have those lengths (DoRA, arXiv 2402.09353): the result is scaled
    by magnitude / norm, where no gradient flows into the norm. All arrays are stacked as the kernel is. A layer of a
    stack that has no adapter has scale 0; ranks below the largest are filled up with zeros, which stay zeros, because
    the gradient of each half of a pair is a multiple of the other.

    Attributes:
      a, b: the two matrices.
      scale: one number for each matrix.
      magnitude: lengths of the columns; None is plain LoRA.
      bias: added, times scale; None has none.
      start_a, start_b: what a and b began with, where that was a part of the base (PiSSA, OLoRA): it is subtracted, so
        that the base stays as it is; None for other beginnings.
      norm: of the adapted columns, if it was computed before; None computes it in place.
      key: for dropout; None drops nothing.
      dropout: share of the inputs of ``a`` that are dropped in training.
      axes: logical axes of the kernel.
    """

    def __init__(
        self,
        a: AdapterParam,
        b: AdapterParam,
        scale: AdapterConstant,
        *,
        axes: tuple[str, str],
        magnitude: AdapterParam | None = None,
        bias: AdapterParam | None = None,
        start: tuple[AdapterConstant, AdapterConstant] | None = None,
        dropout: float = 0.0,
    ):
        self.a, self.b, self.scale, self.magnitude, self.bias = a, b, scale, magnitude, bias
        self.start_a, self.start_b = start or (None, None)
        self.norm: StepValue | None = nnx.data(None)
        self.key: StepValue | None = nnx.data(None)
        self.dropout, self.axes = dropout, axes

    def __call__(
        self, x: Float[Array, "*L i"], y: Float[Array, "*L o"], kernel: Callable[[], Float[Array, "i o"]]
    ) -> Float[Array, "*L o"]:
        """Return the adapted product of ``x``, where ``y`` is that with the frozen kernel."""
        scale = self.scale[...]
        y = y + self._product(self._dropped(x), self.a, self.b, scale)
        if self.start_a is not None:
            y = y - self._product(x, self.start_a, self.start_b, scale)
        if self.magnitude is not None:
            y = (y.astype(jnp.float32) * self.factor(kernel)).astype(y.dtype)
        return y if self.bias is None else y + (scale * self.bias[...]).astype(y.dtype)

    def pair_to_add(self, x: Float[Array, "*L i"]) -> tuple[Float[Array, "i r"], Float[Array, "r o"]] | None:
        """Return a and scale * b if it pays to add their product to the kernel of the product with ``x``; else None.

        That is so for plain LoRA on CPU in float32, where a sum with the kernel loses no more than any product does,
        from as many vectors on as there are inputs.
        """
        dropped = self.key is not None and self.dropout
        if dropped or not (self.start_a is None and self.magnitude is None and self.bias is None):
            return None
        few = x.size < x.shape[-1] ** 2
        if few or x.dtype != jnp.float32 or platforms.target_platform() != "cpu":
            return None
        gather = device_ops.current().all_gather_param
        a = gather(self.a[...].astype(x.dtype), (self.axes[0], RANK))
        b = gather(self.b[...].astype(x.dtype), (RANK, self.axes[1]))
        return a, self.scale[...].astype(x.dtype) * b

    def _product(self, x, a: AdapterParam, b: AdapterParam, scale):
        gather, dtype = device_ops.current().all_gather_param, x.dtype
        a = gather(a[...].astype(dtype), (self.axes[0], RANK))
        b = gather(b[...].astype(dtype), (RANK, self.axes[1]))
        return layers.matmul(layers.matmul(x, a) * scale.astype(dtype), b)

    def _dropped(self, x):
        if self.key is None or not self.dropout:
            return x
        keep = kept(jax.random.wrap_key_data(self.key[...]), 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)

    def looked_up(
        self, tokens: Int[Array, "B S"], y: Float[Array, "B S o"], table: Callable[[], Float[Array, "i o"]]
    ) -> Float[Array, "B S o"]:
        """Return the adapted embeddings of tokens, where ``y`` are those of the frozen table."""
        a, b = self.pairs
        x = device_ops.current().embedding_lookup(a, tokens, y.dtype, axes=(self.axes[0], RANK))
        y = y + layers.matmul(x * self.scale[...].astype(y.dtype), b.astype(y.dtype))
        return y if self.magnitude is None else (y.astype(jnp.float32) * self.factor(table)).astype(y.dtype)

    def extended_input(self, x: Float[Array, "*L i"]) -> Float[Array, "*L R"]:
        """Return ``x`` and, behind it, ``scale * x a``: what `extended_kernel` is multiplied with.

        An output matrix is handed to the loss as a matrix, which would lose small changes if they were added to it in
        the base's dtype.
        """
        a, _ = self.pairs
        a = device_ops.current().all_gather_param(a.astype(x.dtype), (self.axes[0], RANK))
        return jnp.concatenate([x, layers.matmul(x, a) * self.scale[...].astype(x.dtype)], -1)

    def extended_kernel(self, kernel: Float[Array, "i o"]) -> Float[Array, "R o"]:
        """Return the kernel and, below it, ``b``; with a magnitude scaled to it, in float32."""
        _, b = self.pairs
        if self.magnitude is None:
            return jnp.concatenate([kernel, b.astype(kernel.dtype)], -2)
        factor = self.factor(lambda: kernel)
        return jnp.concatenate([kernel.astype(jnp.float32), b], -2) * factor

    def factor(self, kernel: Callable[[], Float[Array, "i o"]]) -> Float[Array, " o"]:
        """Return magnitude / norm, float32; 1 where there is no adapter."""
        norm = column_norm(kernel(), self) if self.norm is None else self.norm[...]
        ratio = self.magnitude[...] / jnp.where(norm > 0, norm, 1)
        return jnp.where(self.scale[...] > 0, ratio, 1)

    def of_experts(self) -> ExpertPairs:
        """Return what is added to the matrices of experts, which all arrays are stacked as."""
        a, b = self.pairs
        return ExpertPairs(a, b * self.scale[...][:, None, None])

    @property
    def pairs(self) -> tuple[Float[Array, "*L i R"], Float[Array, "*L R o"]]:
        """The matrices whose product, times scale, is added to the kernel; with what is subtracted as further ranks."""
        a, b = self.a[...], self.b[...]
        if self.start_a is None:
            return a, b
        return jnp.concatenate([a, self.start_a[...]], -1), jnp.concatenate([b, -self.start_b[...]], -2)


def column_norm(kernel: Float[Array, "*L i o"], adapter: LowRankAdapter) -> Float[Array, "*L o"]:
    """Return the length of each column of ``kernel + scale * a b``, float32, without a matrix of that size.

    n^2 = |W|^2 + 2 s sum_r b (a^T W) + s^2 sum_r b (a^T a b), column by column. No gradient flows through it.
    """
    kernel, (a, b), scale = jax.lax.stop_gradient((kernel.astype(jnp.float32), adapter.pairs, adapter.scale[...]))
    scale = scale[..., None]
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    crossed = (b * einsum("...ir,...io->...ro", a, kernel)).sum(-2)
    square = (b * einsum("...rq,...qo->...ro", einsum("...ir,...iq->...rq", a, a), b)).sum(-2)
    total = jnp.square(kernel).sum(-2) + 2 * scale * crossed + scale**2 * square
    return jnp.sqrt(jnp.maximum(total, 0))


class TokenRows(nnx.Module):
    """Rows of an embedding table that are trained by themselves, in the place of the table's own.

    Attributes:
      ids: tokens that they belong to.
      rows: their vectors.
    """

    def __init__(self, ids: AdapterConstant, rows: AdapterParam):
        self.ids, self.rows = ids, rows

    def replace(self, tokens: Int[Array, "B S"], vectors: Float[Array, "B S d"]) -> Float[Array, "B S d"]:
        """Return the vectors of tokens with those of trained rows in their place."""
        same = tokens[..., None] == self.ids[...]
        rows = jnp.take(self.rows[...].astype(vectors.dtype), jnp.argmax(same, -1), axis=0)
        return jnp.where(same.any(-1)[..., None], rows, vectors)

    def in_table(self, table: Float[Array, "a b"], axis: int) -> Float[Array, "a b"]:
        """Return a table, whose ``axis`` counts tokens, with these rows in it."""
        rows = self.rows[...].astype(table.dtype)
        ids = self.ids[...]
        return table.at[ids].set(rows) if axis == 0 else table.at[:, ids].set(rows.T)
