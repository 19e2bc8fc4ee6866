"""The exponential moving average of the trained parameters, as the last part of an optimizer.

It lies in the optimizer's state: checkpoints have it, it is sharded as the parameters are, and a step that is skipped
leaves it as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class EmaState(NamedTuple):
    """State of `track_ema`.

    Attributes:
      ema: path -> average, float32.
    """

    ema: dict[str, jax.Array]


def track_ema(decay: float) -> optax.GradientTransformation:
    """Return the transformation that changes no update and averages the parameters after it.

    The average begins at the parameters before the first step, and becomes ``decay * average + (1 - decay) *
    parameters`` after each.
    """

    def init(params):
        return EmaState(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), state.ema, new)
        return updates, EmaState(ema)

    return optax.GradientTransformation(init, update)


def ema_of(opt_state: Any, like: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
    """Return the average in an optimizer's state, in the dtypes of ``like``; None where there is none."""
    states = [part for part in opt_state if isinstance(part, EmaState)] if isinstance(opt_state, tuple) else []
    return {path: value.astype(like[path].dtype) for path, value in states[0].ema.items()} if states else None
