"""A mixture of experts in place of a decoder layer's MLP: GShard's and ST-MoE's router, no token dropped by default.

Sources: arXiv 2006.16668 (GShard), 2202.08906 (ST-MoE), and AXLearn's layers, which MM1.5 was trained with.

Axes: B sequences, S tokens, T = B S, k choices a token, N = T k, E experts, C capacity of an expert, D width, F hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int
from jvlm_kernels import grouped_matmul, platforms

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.arithmetic import Product, swiglu_products
from jvlm.models.contracts import MLPConfig
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class MoEConfig(MLPConfig, tag="moe"):
    """The defaults are MM1.5's: 64 experts, two of them for each token, in every second layer.

    Attributes:
      experts: number of experts in a layer.
      top_k: experts that each token takes.
      intermediate_size: width inside each expert.
      renormalise: divide the probabilities of the chosen experts by their sum (GShard; with False they stay as the
        softmax over all experts gave them, as in Switch).
      capacity_factor: an expert takes at most this many times the mean load, first choices before second ones, and
        drops the rest; shapes are then fixed and all products dense. None drops nothing: products follow the load.
        On a mesh the load is that of the sequences of the devices that exchange tokens.
      balance_weight: weight of the load balance loss in the training loss.
      z_weight: weight of the router z-loss in the training loss.
    """

    every: int = 2
    experts: int = 64
    top_k: int = 2
    intermediate_size: int = 8192
    renormalise: bool = True
    capacity_factor: float | None = None
    balance_weight: float = 0.01
    z_weight: float = 0.001

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"top_k {self.top_k} must be between 1 and experts {self.experts}")
        if self.every < 1:
            raise UserError(f"every must be at least 1, got {self.every}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise UserError(f"capacity_factor must be positive, got {self.capacity_factor}")

    def products(self, tokens: float | int, width: int) -> tuple[Product, ...]:
        """Return what one layer multiplies: the router, and of the experts what each token chooses."""
        chosen = tokens * self.top_k
        return (
            Product(tokens, width, self.experts),
            *swiglu_products(chosen, width, self.intermediate_size, grouped=self.capacity_factor is None),
        )

    def capacity(self, tokens: int) -> int:
        """Return how many choices an expert takes in a batch of so many tokens, padding included."""
        return min(tokens, math.ceil(self.capacity_factor * tokens * self.top_k / self.experts))


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
      expert, gate: of each choice of each token; padding goes to no expert, which is number E, with gate 0.
      reports: "loss" for the training, and statistics over the tokens that are not padding.
    """

    expert: Int[Array, "B S k"]
    gate: Float[Array, "B S k"]
    reports: dict[str, Array]


EXPERT_AXES = {
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}


_PRODUCTS = "expert_products"  # name of what the backward pass keeps beside matrices that are stored in another form


class ExpertPairs(NamedTuple):
    """What an adapter adds to the experts' matrices: of each expert the product of two small ones.

    Attributes:
      a, b: with ranks R; scales are in b.
      chosen: which of n equal parts of the ranks a sequence has, as ones and zeros; None has all.
    """

    a: Float[Array, "E i R"]
    b: Float[Array, "E R o"]
    chosen: Float[Array, "B n"] | None = None


class AdapterSlot(nnx.Module):
    """Where the adapter of one of the experts' matrices stands, or None."""

    def __init__(self):
        self.adapter = None

    @property
    def pairs(self) -> ExpertPairs | None:
        """What the adapter adds; None without one, and where no sequence has chosen any."""
        return None if self.adapter is None else self.adapter.of_experts()


@register(MoEConfig)
class MoE(nnx.Module):
    """Router and SwiGLU experts.

    Attributes:
      gate, up, down: matrices of all experts, parameters or a `StoredKernel` that took the place of one.
    """

    def __init__(self, config: MoEConfig, *, width: int, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        E, D, F = config.experts, width, config.intermediate_size

        def weight(name: str, d_in: int, d_out: int) -> nnx.Param:
            keys = jax.random.split(rngs.params(), E)
            value = jax.vmap(lambda key: precision.init_weight(key, (d_in, d_out), d_in))(keys)
            return nnx.Param(value, axes=EXPERT_AXES[name])

        self.router = nnx.Param(precision.init_weight(rngs.params(), (D, E), D), axes=("embed", "experts"))
        self.gate = weight("gate", D, F)
        self.up = weight("up", D, F)
        self.down = weight("down", F, D)
        self.gate_slot, self.up_slot, self.down_slot = AdapterSlot(), AdapterSlot(), AdapterSlot()

    def __call__(
        self, x_BSD: Float[Array, "B S D"], segments: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], dict[str, Array]]:
        """Return the sum of the experts' outputs, zero for padding (segment 0), and the router's reports.

        The reports are "loss", to be added to the training loss; "router/balance" and "router/z", that loss's two
        terms before their weights; "router/entropy" of a token's probabilities, 1 when all experts are equally likely;
        "router/load_max" and "router/load_min", the largest and smallest load of an expert over the mean; and
        "router/dropped", the fraction of choices beyond an expert's capacity.
        """
        valid_BS = segments > 0
        x_BSD = jnp.where(valid_BS[..., None], x_BSD, 0)
        routing = self.route(x_BSD, valid_BS)
        dtype = jnp.dtype(self.precision.compute_dtype)
        pairs = {name: slot.pairs for name, slot in self._slots().items()}
        x = x_BSD.astype(dtype)
        chosen = next((pair.chosen for pair in pairs.values() if pair is not None and pair.chosen is not None), None)
        if chosen is not None:  # travels with each token, in columns behind its own
            columns = jnp.broadcast_to(chosen.astype(dtype)[:, None], (*x.shape[:2], chosen.shape[-1]))
            x = jnp.concatenate([x, columns], -1)
        function = _without_capacity if self.config.capacity_factor is None else self._with_capacity
        counts = tuple(1 if pair is None else 3 for pair in pairs.values())

        def apply(x, expert, gate, pairs):
            weights, axes = self._weights(pairs, dtype)
            return device_ops.current().apply_experts(
                functools.partial(function, counts), x, expert, gate, weights, axes
            )

        if any(isinstance(getattr(self, name), layers.StoredKernel) for name in EXPERT_AXES):
            # the backward pass computes the matrices once more from what is stored
            apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.save_only_these_names(_PRODUCTS))
        y_BSD, taken_BSk = apply(x, routing.expert, routing.gate, pairs)
        choices = jnp.maximum(valid_BS.sum() * self.config.top_k, 1)
        dropped = (choices - taken_BSk.sum()) / choices * valid_BS.any()
        return y_BSD.astype(x_BSD.dtype), {**routing.reports, "router/dropped": dropped}

    def _slots(self) -> dict[str, AdapterSlot]:
        return {name: getattr(self, f"{name}_slot") for name in EXPERT_AXES}

    def _matrix(self, name: str, dtype: jnp.dtype) -> Float[Array, "E _ _"]:
        value = getattr(self, name)
        if isinstance(value, layers.StoredKernel):
            return value.weight(dtype)
        return value[...].astype(dtype)

    def _weights(
        self, pairs: dict[str, ExpertPairs | None], dtype: jnp.dtype
    ) -> tuple[tuple[Array, ...], tuple[tuple[str, ...], ...]]:
        """Return the experts' matrices, behind each the two of its adapter if it has one, and their logical axes."""
        weights, axes = [], []
        for name, names in EXPERT_AXES.items():
            weights.append(self._matrix(name, dtype))
            axes.append(names)
            pair = pairs[name]
            if pair is not None:
                weights += [pair.a.astype(dtype), pair.b.astype(dtype)]
                axes += [(names[0], names[1], "rank"), (names[0], "rank", names[2])]
        return tuple(weights), tuple(axes)

    def route(self, x_BSD: Float[Array, "B S D"], valid_BS: Bool[Array, "B S"]) -> Routing:
        """Return the ``top_k`` most likely experts of a softmax over all, in float32."""
        config, E = self.config, self.config.experts
        router = device_ops.current().all_gather_param(self.router[...].astype(jnp.float32), ("embed", "experts"))
        logits_BSE = jnp.matmul(x_BSD.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        log_probs_BSE = jax.nn.log_softmax(logits_BSE)
        probs_BSE = jnp.exp(log_probs_BSE)
        gate_BSk, expert_BSk = jax.lax.top_k(probs_BSE, config.top_k)
        if config.renormalise:
            gate_BSk = gate_BSk / gate_BSk.sum(-1, keepdims=True)
        weight_BS = valid_BS.astype(jnp.float32)
        tokens = jnp.maximum(weight_BS.sum(), 1.0)

        def mean(values: Array) -> Array:
            return jnp.tensordot(weight_BS, values, 2) / tokens

        first_E = mean(jax.nn.one_hot(expert_BSk[..., 0], E))
        balance = E * jnp.sum(first_E * mean(probs_BSE))
        z = mean(jnp.square(jax.nn.logsumexp(logits_BSE, -1)))
        load_E = mean(jax.nn.one_hot(expert_BSk, E).sum(-2)) * (E / config.top_k)
        reports = {
            "loss": config.balance_weight * balance + config.z_weight * z,
            "router/balance": balance,
            "router/z": z,
            "router/entropy": mean(-jnp.sum(probs_BSE * log_probs_BSE, -1)) / max(math.log(E), 1e-9),
            "router/load_max": load_E.max(),
            "router/load_min": load_E.min(),
        }
        expert_BSk = jnp.where(valid_BS[..., None], expert_BSk, E)
        return Routing(expert_BSk, jnp.where(valid_BS[..., None], gate_BSk, 0.0), reports)

    def _with_capacity(self, counts, x_BSD, expert_BSk, gate_BSk, *weights):
        """Compute the first C choices of each expert."""
        gate, up, down = _grouped(weights, counts)
        (B, S, k), E = expert_BSk.shape, len(gate[0])
        T, C = B * S, self.config.capacity(B * S)
        # all first choices, then all second ones: experts take them in this order
        chosen = _numbered(expert_BSk.reshape(T, k).T.reshape(-1), E)
        before = jnp.cumsum(jax.nn.one_hot(chosen, E, dtype=jnp.int32), axis=0)
        rank = jnp.take_along_axis(before, jnp.minimum(chosen, E - 1)[:, None], axis=1)[:, 0] - 1
        taken = (chosen < E) & (rank < C)
        index = jnp.where(taken, chosen * C + rank, E * C)
        x = jnp.zeros((E * C, x_BSD.shape[-1]), x_BSD.dtype)
        x = x.at[index].set(jnp.tile(x_BSD.reshape(T, -1), (k, 1)), mode="drop").reshape(E, C, -1)
        y = _swiglu(functools.partial(jnp.einsum, "ecd,edf->ecf"), x, gate, up, down).reshape(E * C, -1)
        outputs = jnp.where(taken[:, None], y[jnp.minimum(index, E * C - 1)], 0)
        by_token = outputs.reshape(k, T, -1).swapaxes(0, 1)
        return _combine(by_token, gate_BSk, x_BSD.dtype), taken.astype(jnp.float32).reshape(k, T).T.reshape(B, S, k)


def _grouped(weights: tuple[Array, ...], counts: tuple[int, ...]) -> Iterator[tuple[Array, ...]]:
    """Yield for gate, up and down the matrix, and the two of its adapter if it has one."""
    rest = list(weights)
    for count in counts:
        yield tuple(rest[:count])
        del rest[:count]


def _without_capacity(counts, x_BSD, expert_BSk, gate_BSk, *weights):
    """Compute every choice."""
    arguments = (x_BSD, expert_BSk, gate_BSk, *_grouped(weights, counts))
    if x_BSD.shape[1] > 1:
        return _by_chosen_experts(*arguments)
    return platforms.platform_dependent(*arguments, tpu=_by_all_experts, default=_by_chosen_experts)


def _swiglu(product: Callable[[Array, Array], Array], x: Array, gate, up, down) -> Array:
    """Return the experts' outputs; what is in ``x`` behind their inputs says which adapter a row has."""
    width = gate[0].shape[1]
    x, chosen = x[..., :width], x[..., width:]
    hidden = jax.nn.silu(_adapted(product, x, gate, chosen)) * _adapted(product, x, up, chosen)
    return _adapted(product, hidden, down, chosen)


def _adapted(
    product: Callable[[Array, Array], Array], x: Array, weights: tuple[Array, ...], chosen: Float[Array, "*L n"]
) -> Array:
    """Return the product with a matrix, and with the two of its adapter if there are three."""
    y = product(x, weights[0])
    if len(weights) > 1:
        hidden, n = product(x, weights[1]), chosen.shape[-1]
        y = y + product(hidden * jnp.repeat(chosen, hidden.shape[-1] // n, -1) if n else hidden, weights[2])
    return checkpoint_name(y, _PRODUCTS)


def _numbered(expert, count: int):
    """Return the numbers of this device's experts, and ``count`` for all others."""
    return jnp.where((expert >= 0) & (expert < count), expert, count)


def _combine(y, gate_BSk, dtype):
    y_BSkD = y.reshape(*gate_BSk.shape, -1).astype(jnp.float32)
    return jnp.einsum("bskd,bsk->bsd", y_BSkD, gate_BSk).astype(dtype)


def _by_chosen_experts(x_BSD, expert_BSk, gate_BSk, gate, up, down):
    """Return (sum of the experts' outputs, choices taken): tokens sorted by expert, one grouped product a matrix."""
    E, k = len(gate[0]), expert_BSk.shape[-1]
    x_TD, expert_N = x_BSD.reshape(-1, x_BSD.shape[-1]), _numbered(expert_BSk.reshape(-1), E)
    order = jnp.argsort(expert_N, stable=True)
    sizes = jnp.bincount(expert_N, length=E + 1)[:-1].astype(jnp.int32)
    # what lies behind the last group belongs to no expert: whatever a kernel leaves there must not get out
    grouped = (jnp.arange(len(order)) < sizes.sum())[:, None]
    x = jnp.where(grouped, x_TD[order // k], 0)

    def product(x, matrices):
        return grouped_matmul(x, matrices, sizes)

    y = jnp.where(grouped, _swiglu(product, x, gate, up, down), 0)[jnp.argsort(order)]
    return _combine(y, gate_BSk, x_BSD.dtype), (expert_N < E).astype(jnp.float32).reshape(expert_BSk.shape)


def _by_all_experts(x_BSD, expert_BSk, gate_BSk, gate, up, down):
    """As `_by_chosen_experts`, for sequences of one token: every expert computes each, with weight 0 if not chosen.

    For a step of decoding on TPU: it reads all weights anyway and has arithmetic to spare, and a grouped product is a
    kernel there, for which XLA would copy the weights out of their stack of layers in each step.
    """
    E = len(gate[0])
    expert_Bk, x_BD = _numbered(expert_BSk[:, 0], E), x_BSD[:, 0]
    weight_BE = (jax.nn.one_hot(expert_Bk, E) * gate_BSk[:, 0, :, None].astype(jnp.float32)).sum(1)
    x_EBD = jnp.broadcast_to(x_BD, (E, *x_BD.shape))
    y = _swiglu(functools.partial(jnp.einsum, "ebd,edf->ebf"), x_EBD, gate, up, down)
    added = jnp.einsum("ebd,be->bd", y.astype(jnp.float32), weight_BE).astype(x_BSD.dtype)
    return added[:, None], (expert_Bk < E).astype(jnp.float32)[:, None]
