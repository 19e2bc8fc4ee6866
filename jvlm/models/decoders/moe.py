"""A mixture of experts in place of a decoder layer's MLP: GShard's and ST-MoE's router, no token dropped by default.

Sources: arXiv 2006.16668 (GShard), 2202.08906 (ST-MoE), and AXLearn's layers, which MM1.5 was trained with.

Axes: B rows, S tokens, T = B S, k choices of a token, E experts, C places of an expert, D width, F hidden.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jvlm.models import layers, placement
from jvlm.models.registry import MLPConfig, register


@dataclasses.dataclass(frozen=True)
class MoEConfig(MLPConfig):
    """The defaults are MM1.5's: 64 experts, two of them for each token, in every second layer.

    Attributes:
      intermediate_size: of each expert.
      renormalise: divide the probabilities of the chosen experts by their sum (GShard; with False they stay as the
        softmax over all experts gave them, as in Switch).
      capacity_factor: an expert takes at most this many times the mean load, first choices before second ones, and
        drops the rest; shapes are then fixed and all products dense. None drops nothing: products follow the load.
      balance_weight, z_weight: of the load balance loss and the router z-loss in the training loss.
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
            raise ValueError(f"top_k {self.top_k} must be between 1 and experts {self.experts}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive, got {self.capacity_factor}")

    def capacity(self, tokens: int) -> int:
        """Places of an expert in a batch of so many tokens, padding included."""
        return min(tokens, math.ceil(self.capacity_factor * tokens * self.top_k / self.experts))


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
      expert, gate: of each choice of each token; padding goes to no expert, which is number E, with gate 0.
      report: "loss" for the training, and statistics over the tokens that are no padding.
    """

    expert: Int[Array, "T k"]
    gate: Float[Array, "T k"]
    report: dict[str, Array]


@register(MoEConfig)
class MoE(nnx.Module):
    """Router and SwiGLU experts."""

    def __init__(self, config: MoEConfig, *, width: int, numerics: layers.Numerics, rngs: nnx.Rngs):
        self.config, self.numerics = config, numerics
        E, D, F = config.experts, width, config.intermediate_size

        def weight(d_in: int, d_out: int, axes: tuple[str, str]) -> nnx.Param:
            keys = jax.random.split(rngs.params(), E)
            value = jax.vmap(lambda key: numerics.new_weight(key, (d_in, d_out), d_in))(keys)
            return nnx.Param(value, axes=("experts", *axes))

        self.router = nnx.Param(numerics.new_weight(rngs.params(), (D, E), D), axes=("embed", "experts"))
        self.gate = weight(D, F, ("embed", "mlp"))
        self.up = weight(D, F, ("embed", "mlp"))
        self.down = weight(F, D, ("mlp", "embed"))

    def __call__(
        self, x_BSD: Float[Array, "B S D"], segments: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], dict[str, Array]]:
        """What the experts add, zero for padding (segment 0), and the router's report.

        The report holds "loss", to be added to the training loss; "router/balance" and "router/z", that loss's two
        parts before their weights; "router/entropy" of a token's probabilities, 1 when all experts are alike;
        "router/load_max" and "router/load_min", the fullest and emptiest expert's load over the mean; and
        "router/dropped", the share of choices that found no place.
        """
        B, S, D = x_BSD.shape
        valid_T = segments.reshape(-1) > 0
        x_TD = jnp.where(valid_T[:, None], x_BSD.reshape(-1, D), 0)
        routing = self.route(x_TD, valid_T)
        if self.config.capacity_factor is None:
            y_TD, dropped = self._all(x_TD, routing), jnp.zeros((), jnp.float32)
        else:
            y_TD, dropped = self._at_most(x_TD, routing)
        return y_TD.reshape(B, S, D), {**routing.report, "router/dropped": dropped}

    def route(self, x_TD: Float[Array, "T D"], valid_T: Bool[Array, " T"]) -> Routing:
        """Softmax over all experts in float32, then the ``top_k`` most likely."""
        config, E = self.config, self.config.experts
        router = placement.current().weight(self.router[...].astype(jnp.float32), ("embed", "experts"))
        logits_TE = jnp.matmul(x_TD.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        log_probs_TE = jax.nn.log_softmax(logits_TE)
        probs_TE = jnp.exp(log_probs_TE)
        gate_Tk, expert_Tk = jax.lax.top_k(probs_TE, config.top_k)
        if config.renormalise:
            gate_Tk = gate_Tk / gate_Tk.sum(-1, keepdims=True)
        weight_T = valid_T.astype(jnp.float32)
        tokens = jnp.maximum(weight_T.sum(), 1.0)

        def mean(values: Array) -> Array:
            return jnp.tensordot(weight_T, values, 1) / tokens

        first_E = mean(jax.nn.one_hot(expert_Tk[:, 0], E))
        balance = E * jnp.sum(first_E * mean(probs_TE))
        z = mean(jnp.square(jax.nn.logsumexp(logits_TE, -1)))
        load_E = mean(jax.nn.one_hot(expert_Tk, E).sum(1)) * (E / config.top_k)
        report = {
            "loss": config.balance_weight * balance + config.z_weight * z,
            "router/balance": balance,
            "router/z": z,
            "router/entropy": mean(-jnp.sum(probs_TE * log_probs_TE, -1)) / max(math.log(E), 1e-9),
            "router/load_max": load_E.max(),
            "router/load_min": load_E.min(),
        }
        expert_Tk = jnp.where(valid_T[:, None], expert_Tk, E)
        return Routing(expert_Tk, jnp.where(valid_T[:, None], gate_Tk, 0.0), report)

    def _experts(self) -> tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
        dtype = jnp.dtype(self.numerics.compute_dtype)
        return tuple(
            placement.current().weight(part[...].astype(dtype), part.get_metadata()["axes"][-3:])
            for part in (self.gate, self.up, self.down)
        )

    def _all(self, x_TD: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """Every choice: rows sorted by expert, one grouped product for each matrix."""
        T, k = routing.expert.shape
        order = jnp.argsort(routing.expert.reshape(-1), stable=True)
        sizes = jnp.bincount(routing.expert.reshape(-1), length=self.config.experts + 1)[:-1].astype(jnp.int32)
        # rows behind the last group are padding's: whatever a kernel leaves there must not get out
        grouped = (jnp.arange(T * k) < sizes.sum())[:, None]
        gate, up, down = self._experts()
        x = x_TD[order // k].astype(gate.dtype)
        hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, sizes)) * jax.lax.ragged_dot(x, up, sizes)
        y = jnp.where(grouped, jax.lax.ragged_dot(hidden, down, sizes), 0)
        back = jnp.argsort(order)
        return _combine(y[back].reshape(T, k, -1), routing.gate, x_TD.dtype)

    def _at_most(self, x_TD: Float[Array, "T D"], routing: Routing) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
        """As many choices as experts have places: (what they add, share of the choices dropped)."""
        (T, k), E = routing.expert.shape, self.config.experts
        C = self.config.capacity(T)
        chosen = routing.expert.T.reshape(-1)  # all first choices, then all second ones: so places are given away
        before = jnp.cumsum(jax.nn.one_hot(chosen, E, dtype=jnp.int32), axis=0)
        rank = jnp.take_along_axis(before, jnp.minimum(chosen, E - 1)[:, None], axis=1)[:, 0] - 1
        kept = (chosen < E) & (rank < C)
        place = jnp.where(kept, chosen * C + rank, E * C)
        gate, up, down = self._experts()
        x = jnp.zeros((E * C, x_TD.shape[1]), gate.dtype)
        x = x.at[place].set(jnp.tile(x_TD.astype(gate.dtype), (k, 1)), mode="drop").reshape(E, C, -1)
        hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", x, gate)) * jnp.einsum("ecd,edf->ecf", x, up)
        y = jnp.einsum("ecf,efd->ecd", hidden, down).reshape(E * C, -1)
        found = jnp.where(kept[:, None], y[jnp.minimum(place, E * C - 1)], 0)
        asked = jnp.maximum((chosen < E).sum(), 1)
        dropped = ((chosen < E) & ~kept).sum() / asked
        return _combine(found.reshape(k, T, -1).swapaxes(0, 1), routing.gate, x_TD.dtype), dropped.astype(jnp.float32)


def _combine(y_TkD, gate_Tk, dtype):
    return jnp.einsum("tkd,tk->td", y_TkD.astype(jnp.float32), gate_Tk).astype(dtype)
