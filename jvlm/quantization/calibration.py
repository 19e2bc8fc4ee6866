"""Rounding a language model layer by layer, with what each of its matrices sees of the user's examples.

The examples pass through one layer at a time: what its matrices see is measured, they are rounded, and what the rounded
layer gives is what the next one sees. At no time is more than one layer's statistics held.

Axes: i inputs, o outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.models.decoders.transformer import Context, Transformer
from jvlm.models.layers import Linear, StoredKernel
from jvlm.models.vlm import VLM
from jvlm.quantization import rounding
from jvlm.quantization.rounding import Rounded

Method = Literal["fp8", "rtn", "gptq", "awq"]
BLOCKS = "decoder.blocks.layer"


@dataclasses.dataclass(frozen=True)
class RoundingConfig:
    """How matrices of the language model are rounded for export.

    Attributes:
      method: "fp8" is e4m3 with a scale for each output; the others are integers with a scale for each group: "rtn"
        rounds to nearest, "gptq" and "awq" need examples.
      bits: of the integers.
      group_size: inputs that share a scale; fp8 has none.
    """

    method: Method
    bits: Literal[4, 8] = 4
    group_size: int = 128

    @property
    def needs_examples(self) -> bool:
        return self.method in ("gptq", "awq")


@dataclasses.dataclass(frozen=True)
class RoundedModel:
    """What came of it.

    Attributes:
      matrices: of each kernel, by (dotted path, layer).
      replaced: (path, layer) -> parameters that AWQ scaled: norms, and biases.
      errors: root mean square error of each matrix's outputs over the examples, as a share of the outputs'; without
        examples of the weights.
    """

    matrices: Mapping[tuple[str, int], Rounded]
    replaced: Mapping[tuple[str, int], np.ndarray]
    errors: Mapping[tuple[str, int], float]
    measured_on_examples: bool

    def report(self) -> str:
        """Return the mean error by role, a line each, and the largest."""
        by_role: dict[str, list[float]] = {}
        for (path, _), error in self.errors.items():
            by_role.setdefault(path.removeprefix(f"{BLOCKS}.").removesuffix(".kernel"), []).append(error)
        of = "outputs over the examples" if self.measured_on_examples else "weights"
        lines = [f"relative error of {of}:"]
        lines += [f"  {role:<20} {np.mean(errors):.4f}, at most {max(errors):.4f}" for role, errors in by_role.items()]
        return "\n".join([*lines, f"  {'all':<20} {np.mean(list(self.errors.values())):.4f}"])


class _Measured(StoredKernel):
    """A kernel that notes what it is multiplied with."""

    def __init__(self, kernel: Float[Array, "i o"], note: Callable[[Array], None]):
        self.shape, self.kernel, self.note = kernel.shape, nnx.Param(kernel), note

    def weight(self, dtype: DTypeLike) -> Float[Array, "i o"]:
        return self.kernel[...].astype(dtype)

    def product(self, x: Float[Array, "*L i"], *, pad_in: int = 0, pad_out: int = 0) -> Float[Array, "*L o"]:
        self.note(x[..., : self.shape[0]])
        return x @ jnp.pad(self.weight(x.dtype), ((0, pad_in), (0, pad_out)))


class _Layers:
    """The layers of a decoder, one at a time, with compiled functions that all of them share."""

    def __init__(self, model: VLM):
        if not isinstance(model.decoder, Transformer):
            raise UserError(f"{type(model.decoder).__name__} cannot be calibrated; choose rtn or fp8 without examples")
        self.graph, self.state = nnx.split(model.decoder.blocks.layer)
        self.depth = model.decoder.blocks.depth
        self.run = jax.jit(self._run)
        self.measure = jax.jit(self._measure)

    def of(self, layer: int) -> nnx.State:
        return jax.tree.map(lambda value: value[layer], self.state)

    def _run(self, state: nnx.State, x: Array, context: Context) -> Array:
        return nnx.merge(self.graph, state)(x, context)[0]

    def _measure(self, state: nnx.State, x: Array, context: Context) -> dict[str, tuple[Array, Array, Array]]:
        """Return, by path of a linear layer, the sums over tokens of outer products and magnitudes, and their count."""
        layer, measured = nnx.merge(self.graph, state), {}
        real = (context.segments > 0)[..., None]

        def noting(path: str) -> Callable[[Array], None]:
            def note(x: Array) -> None:
                x = jnp.where(real, x, 0).astype(jnp.float32).reshape(-1, x.shape[-1])
                measured[path] = (x.T @ x, jnp.abs(x).sum(0), real.sum().astype(jnp.float32))

            return note

        for path, linear in list(nnx.iter_modules(layer)):
            if isinstance(linear, Linear):
                linear.kernel = _Measured(linear.weight(linear.compute_dtype), noting(".".join(map(str, path))))
        layer(x, context)
        return measured


def round_model(model: VLM, config: RoundingConfig, examples: Iterable[PackedBatch] | None, dtype: str) -> RoundedModel:
    """Return every linear layer of the language model rounded, and what that costs.

    Args:
      examples: batches to calibrate on and to measure the outputs' error with; None rounds without.
      dtype: of scales.

    Raises:
      UserError: a method that needs examples without any; groups that do not divide a matrix.
    """
    stack = model.decoder.blocks.layer
    linears = {".".join(map(str, path)): part for path, part in nnx.iter_modules(stack) if isinstance(part, Linear)}
    for path, linear in linears.items():
        if isinstance(linear.kernel, StoredKernel):
            raise UserError(f"{BLOCKS}.{path} is quantised already: export the model that it was made from")
        if config.method != "fp8":
            rounding.check_groups(linear.stacked_shape[-2], config.group_size, f"{BLOCKS}.{path}")
    if examples is None:
        if config.needs_examples:
            raise UserError(f"{config.method} needs examples to calibrate on; give some, or take rtn")
        return _without_examples(linears, model.decoder.blocks.depth, config, dtype)
    layers, streams = _Layers(model), [_inputs(model, batch) for batch in examples]
    if not streams:
        raise UserError("no examples to calibrate on: the data gave none")
    matrices, replaced, errors = {}, {}, {}
    for number in range(layers.depth):
        state = layers.of(number)
        grams = _summed(layers.measure(state, x, context) for x, context in streams)
        weights = {path: _weight(state, path) for path in linears}
        folded = {}
        if config.method == "awq":
            folded = _awq(weights, grams, state, config, dtype)
            replaced |= {(f"{BLOCKS}.{path}", number): value for path, value in folded.items()}
        for path, weight in weights.items():
            gram = grams[path][0]
            rounded = _rounded(weight, gram, config, dtype)
            matrices[f"{BLOCKS}.{path}.kernel", number] = rounded
            errors[f"{BLOCKS}.{path}.kernel", number] = rounding.output_error(weight, rounded.values(), gram)
        new = _replaced(
            state, {f"{p}.kernel": matrices[f"{BLOCKS}.{p}.kernel", number].values().T for p in weights} | folded
        )
        streams = [(layers.run(new, x, context), context) for x, context in streams]
    return RoundedModel(matrices, replaced, errors, True)


def _inputs(model: VLM, batch: PackedBatch) -> tuple[Array, Context]:
    embeddings = model.decoder.embed(jnp.asarray(batch.tokens))
    inputs = model.decoder.fuse(embeddings, model.encode(batch), batch)
    return inputs.embeddings, model.decoder.context(inputs)


def _summed(measured: Iterable[dict[str, tuple[Array, Array, Array]]]) -> dict[str, list[np.ndarray]]:
    total: dict[str, list[np.ndarray]] = {}
    for one in measured:
        for path, sums in one.items():
            arrays = [np.asarray(value) for value in sums]
            total[path] = [a + b for a, b in zip(total[path], arrays, strict=True)] if path in total else arrays
    return total


def _flat(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _weight(state: nnx.State, path: str) -> Float[np.ndarray, "o i"]:
    return np.ascontiguousarray(np.asarray(_flat(state)[f"{path}.kernel"].get_value()).T, np.float32)


def _rounded(weight: np.ndarray, gram: np.ndarray, config: RoundingConfig, dtype: str) -> Rounded:
    options = {"bits": config.bits, "group": config.group_size, "dtype": dtype}
    if config.method == "fp8":
        return rounding.fp8(weight, dtype)
    if config.method == "gptq":
        return rounding.gptq(weight, gram, **options)
    return rounding.to_nearest(weight, **options)


def _without_examples(linears: Mapping[str, Linear], depth: int, config: RoundingConfig, dtype: str) -> RoundedModel:
    matrices, errors = {}, {}
    for path, linear in linears.items():
        for layer in range(depth):
            weight = np.ascontiguousarray(np.asarray(linear.kernel.get_value()[layer]).T, np.float32)
            rounded = _rounded(weight, np.empty((0, 0)), config, dtype)
            key = f"{BLOCKS}.{path}.kernel", layer
            matrices[key] = rounded
            errors[key] = float(np.linalg.norm(rounded.values() - weight) / max(np.linalg.norm(weight), 1e-30))
    return RoundedModel(matrices, {}, errors, False)


def _replaced(state: nnx.State, values: Mapping[str, np.ndarray]) -> nnx.State:
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = values.get(".".join(map(str, path)))
        if value is not None:
            variable = variable.replace(jnp.asarray(value, variable.get_value().dtype))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def _awq(
    weights: dict[str, np.ndarray],
    grams: dict[str, list[np.ndarray]],
    state: nnx.State,
    config: RoundingConfig,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Scale matrices and what comes before them, in place in ``weights`` and ``grams``; returns norms and biases.

    Before queries, keys and values, and before the MLP, is a norm; before the MLP's last matrix its second one. Values
    come before the output of attention: they are scaled where there are as many key heads as query heads.
    """
    variables = {path: np.asarray(v.get_value(), np.float32) for path, v in _flat(state).items()}
    folded: dict[str, np.ndarray] = {}
    for prefix in sorted({path.rpartition("attention.q")[0] for path in weights if path.endswith("attention.q")}):
        at = {name: f"{prefix}{name}" for name in ("norm1", "norm2")}
        groups = [
            (at["norm1"], [f"{prefix}attention.{part}" for part in "qkv"]),
            (f"{prefix}attention.v", [f"{prefix}attention.out"]),
            (at["norm2"], [f"{prefix}mlp.gate", f"{prefix}mlp.up"]),
            (f"{prefix}mlp.up", [f"{prefix}mlp.down"]),
        ]
        for before, after in groups:
            if not all(path in weights for path in after):
                continue  # experts, which stay as they are
            if before in weights and len(weights[before]) != weights[after[0]].shape[1]:
                continue  # fewer key heads than query heads
            gram, magnitude, count = grams[after[0]]
            options = {"bits": config.bits, "group": config.group_size, "dtype": dtype}
            scale = rounding.awq_scale([weights[p] for p in after], gram, magnitude / max(count, 1), **options)
            for path in after:
                weights[path] = weights[path] * scale
                grams[path][0] = grams[path][0] / np.outer(scale, scale)
            if before in weights:
                weights[before] = weights[before] / scale[:, None]
                if f"{before}.bias" in variables:
                    folded[f"{before}.bias"] = variables[f"{before}.bias"] / scale
            else:
                folded[f"{before}.scale"] = variables[f"{before}.scale"] / scale
    return folded
