"""Which parameters a run trains: a predicate over (path, variable); the others are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from flax import nnx

from jvlm.adapters.layers import AdapterConstant, AdapterParam
from jvlm.adapters.plan import AdapterPlan
from jvlm.errors import UserError
from jvlm.quantization.kernels import QuantizedParam
from jvlm.training.optimizer.config import OptimizerConfig, matches

IsTrainable = Callable[[str, nnx.Variable], bool]


def everything(path: str, variable: nnx.Variable) -> bool:
    """Train every parameter, those of adapters among them."""
    return not isinstance(variable, AdapterConstant)


def from_config(config: OptimizerConfig, adapters: AdapterPlan | None = None) -> IsTrainable:
    """Return the predicate of a configuration.

    A parameter is trained if its learning rate is above 0, ``train`` is empty or one of its patterns matches the path,
    and no pattern of ``freeze`` does. In a model with adapters these are trained, and of the base only what their plan
    names.
    """

    def is_trainable(path: str, variable: nnx.Variable) -> bool:
        if isinstance(variable, AdapterConstant):
            return False
        if adapters is not None and not isinstance(variable, AdapterParam) and path not in adapters.parameters:
            return False
        chosen = not config.train or matches(path, config.train)
        return config.group_of(path)[1] > 0 and chosen and not matches(path, config.freeze)

    return is_trainable


def check_patterns(config: OptimizerConfig, paths: Iterable[str]) -> None:
    """Raise UserError for a pattern that matches no parameter, naming the nearest paths."""
    paths = list(paths)
    patterns = {name: getattr(config, name) for name in ("train", "freeze", "no_decay")}
    patterns["lr_pattern"] = tuple(pattern for pattern, _ in config.lr_pattern)
    for field, given in patterns.items():
        for pattern in given:
            if not any(matches(path, (pattern,)) for path in paths):
                near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or sorted(paths)[:3]
                raise UserError(f"optimizer.{field}: {pattern!r} matches no parameter; there are {', '.join(near)}")


def select(is_trainable: IsTrainable, variables: Mapping[str, nnx.Variable]) -> dict[str, nnx.Variable]:
    """Return the variables that are trained, by path. Raises UserError if there are none."""
    chosen = {path: variable for path, variable in variables.items() if is_trainable(path, variable)}
    if not chosen:
        raise UserError("every parameter is frozen, so nothing would be trained: see optimizer.train and .freeze")
    return chosen


def check_not_quantized(chosen: Mapping[str, nnx.Variable]) -> None:
    """Raise UserError for quantised kernels among the variables that are trained."""
    paths = [path for path, variable in chosen.items() if isinstance(variable, QuantizedParam)]
    if paths:
        raise UserError(
            f"quantize: quantised matrices cannot be trained, and {len(paths)} of their parts would be, as {paths[0]}; "
            "train an adapter on them (adapter), freeze them (optimizer.freeze, decoder_lr = 0), or take them out of "
            "quantize.targets"
        )
