"""Several adapters on one model in generation: each sequence has one of them, or none.

Adapters are stacked along an axis n, with an empty one first, and their ranks filled up to the largest with zeros: one
compiled program serves any of them. Sequences with none get the base's bits.

Axes: B sequences, n adapters with the empty one, i inputs, o outputs, r rank.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jvlm.adapters import base_matrices, folders
from jvlm.adapters.layers import RANK, AdapterConstant
from jvlm.adapters.weights import AdapterWeights, LowRank, Target
from jvlm.errors import UserError
from jvlm.models import device_ops
from jvlm.models.decoders.moe import ExpertPairs
from jvlm.models.vlm import VLM
from jvlm.weights.vocabulary import HEAD

# numbers of the adapters of the model that this thread traces
_NUMBERS: contextvars.ContextVar[Array | None] = contextvars.ContextVar("numbers", default=None)


@contextlib.contextmanager
def choosing(index: Int[Array, " B"] | None) -> Iterator[None]:
    """Trace a model with the number of each sequence's adapter; None, and number 0, are no adapter."""
    token = _NUMBERS.set(index)
    try:
        yield
    finally:
        _NUMBERS.reset(token)


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """What `VLM.adapters` is in a model with several adapters: their names, from number 1 on; None where room is left.

    Programs do not depend on names: those of one set of adapters serve another of the same shapes.
    """

    names: tuple[str | None, ...] = dataclasses.field(compare=False)

    def number(self, name: str | None) -> int:
        """Return the number of an adapter; 0 for None. Raises UserError naming the known ones."""
        if name is None:
            return 0
        if name not in self.names:
            raise UserError(f"no adapter {name!r}; there are {', '.join(filter(None, self.names))}")
        return self.names.index(name) + 1


class AdapterChoice(nnx.Module):
    """Stands where a `LowRankAdapter` stands, and takes for each sequence the adapter that it asks for.

    Attributes:
      a, b: [*, n, i, r] and [*, n, r, o]; scales are in b. Of experts [*, E, n, i, r] and [*, E, n, r, o].
      factor: of the columns, [*, n, o]: DoRA's magnitude / norm; None where no adapter has one.
      bias: [*, n, o]; None where no adapter has one.
    """

    def __init__(
        self,
        a: AdapterConstant,
        b: AdapterConstant,
        factor: AdapterConstant | None,
        bias: AdapterConstant | None,
        axes: tuple[str, str],
    ):
        self.a, self.b, self.factor, self.bias, self.axes = a, b, factor, bias, axes

    def __call__(
        self, x: Float[Array, "B *L i"], y: Float[Array, "B *L o"], kernel: Callable[[], Array]
    ) -> Float[Array, "B *L o"]:
        """Return the adapted product of ``x``, where ``y`` is that with the frozen kernel."""
        index = _NUMBERS.get()
        if index is None:
            return y
        a, b = (part[...].astype(x.dtype)[index] for part in (self.a, self.b))
        hidden = jnp.einsum("b...i,bir->b...r", x, a)
        return self._finished(y + jnp.einsum("b...r,bro->b...o", hidden, b), index)

    def of_experts(self) -> ExpertPairs | None:
        """Return the adapters of experts one behind the other along the ranks, and which of them a sequence has."""
        index = _NUMBERS.get()
        if index is None:
            return None
        a, b = self.a[...], self.b[...]
        (E, n, i, r), o = a.shape, b.shape[-1]
        chosen = jax.nn.one_hot(index, n, dtype=jnp.float32)
        return ExpertPairs(a.swapaxes(1, 2).reshape(E, i, n * r), b.reshape(E, n * r, o), chosen)

    def pair_to_add(self, x: Float[Array, "B *L i"]) -> None:
        """Return None: the sequences of a batch have different adapters, so nothing can be added to the kernel."""

    def looked_up(
        self, tokens: Int[Array, "B S"], y: Float[Array, "B S o"], table: Callable[[], Array]
    ) -> Float[Array, "B S o"]:
        """Return the adapted embeddings of tokens, where ``y`` are those of the frozen table."""
        index = _NUMBERS.get()
        if index is None:
            return y
        n, vocabulary, rank = self.a.get_value().shape
        table_a = self.a[...].astype(y.dtype).swapaxes(0, 1).reshape(vocabulary, n * rank)
        hidden = device_ops.current().embedding_lookup(table_a, tokens, y.dtype, axes=(self.axes[0], RANK))
        hidden = hidden.reshape(*tokens.shape, n, rank)
        own = jnp.take_along_axis(hidden, index[:, None, None, None], axis=2)[:, :, 0]
        return self._finished(y + jnp.einsum("bsr,bro->bso", own, self.b[...].astype(y.dtype)[index]), index)

    def _finished(self, y, index):
        def of_sequence(part: AdapterConstant) -> Array:
            value = part[...][index]
            return value.reshape(value.shape[0], *[1] * (y.ndim - 2), value.shape[-1])

        if self.factor is not None:
            y = (y.astype(jnp.float32) * of_sequence(self.factor)).astype(y.dtype)
        return y if self.bias is None else y + of_sequence(self.bias).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class AdapterRoom:
    """Arrays for adapters that are not there yet: what is loaded into them needs no new program.

    Attributes:
      rank: largest rank.
      paths: patterns of the matrices that may have an adapter.
      experts: whether the matrices of all experts may have one too. Their room is that of one layer's MLP for each
        expert.
    """

    rank: int
    paths: tuple[str, ...] = ("decoder.blocks.*.kernel",)
    experts: bool = False

    @classmethod
    def of_model(cls, rank: int, *, towers: bool, experts: bool = False) -> AdapterRoom:
        """Return room beside the matrices of the language model's layers; with ``towers`` of all towers."""
        return cls(rank, (*cls.paths, "encoder.*.kernel", "connector.*.kernel") if towers else cls.paths, experts)

    def of(self, matrices: Mapping[str, base_matrices.Matrix]) -> frozenset[str]:
        """Return the paths of a model beside which room is kept."""

        def has_room(path: str, matrix: base_matrices.Matrix) -> bool:
            if matrix.is_of_experts:
                return self.experts
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.paths)

        return frozenset(path for path, matrix in matrices.items() if has_room(path, matrix))


def stacked(
    model: VLM,
    adapters: Mapping[str, AdapterWeights] | Sequence[tuple[str, AdapterWeights] | None],
    room: AdapterRoom | None = None,
) -> VLM:
    """Return a model of which each sequence takes one of several adapters; it shares the arrays of the base.

    Args:
      model: the base, without adapters.
      adapters: by the names that requests give; with ``room``, (name, adapter) of each place, and None of an empty one.
      room: gives all matrices that it names arrays of its rank, whatever the adapters have.

    Raises:
      UserError: adapters with what no sequence can have for itself: whole modules, rows of tokens, a head;
        with ``room``, one that it does not hold.
    """
    if model.adapters is not None:
        raise UserError("the model has adapters already; give its base, and all adapters by name")
    entries = list(adapters.items()) if isinstance(adapters, Mapping) else list(adapters)
    matrices = base_matrices.matrices(model)
    reserved = frozenset() if room is None else room.of(matrices)
    for name, weights in filter(None, entries):
        _check(name, weights)
        if room is not None:
            _check_room(name, weights, room, reserved)
    given = [None if entry is None else entry[1] for entry in entries]
    result = nnx.merge(*nnx.split(model))
    paths = {target.path for weights in given if weights is not None for target in weights.low_rank}
    for path in sorted(paths | reserved):
        if path not in matrices:
            raise UserError(f"an adapter has a target {path}, which the model does not have")
        chosen = _choice(path, matrices[path], given, None if room is None else room.rank)
        base_matrices.module_of(result, path).adapter = nnx.data(chosen)
    result.adapters = AdapterNames(tuple(None if entry is None else entry[0] for entry in entries))
    return result


def structure(model: VLM, places: int, room: AdapterRoom) -> VLM:
    """Return a model of shapes with room for adapters: what `stacked` gives for empty places, without arrays."""
    matrices, result = base_matrices.matrices(model), nnx.merge(*nnx.split(model))
    for path in sorted(room.of(matrices)):
        *lead, d_in, d_out = matrices[path].shape
        shapes, axes = {"a": (d_in, room.rank), "b": (room.rank, d_out)}, _axes_of(matrices[path])
        made = {
            name: AdapterConstant(jax.ShapeDtypeStruct((*lead, places + 1, *shape), jnp.float32), axes=axes[name])
            for name, shape in shapes.items()
        }
        base_matrices.module_of(result, path).adapter = nnx.data(
            AdapterChoice(**made, factor=None, bias=None, axes=matrices[path].axes[-2:])
        )
    result.adapters = AdapterNames((None,) * places)
    return result


def _axes_of(base: base_matrices.Matrix) -> dict[str, tuple[str | None, ...]]:
    """Return the logical axes of the parts of an `AdapterChoice`."""
    *experts, i, o = base.axes
    before = (*experts, None) if experts else ()  # of experts, then of adapters
    return {"a": (*before, i, RANK), "b": (*before, RANK, o), "factor": (*before, o), "bias": (*before, o)}


def _check_room(name: str, weights: AdapterWeights, room: AdapterRoom, reserved: frozenset[str]) -> None:
    for target, one in weights.low_rank.items():
        if target.path not in reserved:
            kept = ", ".join((*room.paths, *["all experts"] * room.experts))
            raise UserError(
                f"adapter {name!r} has a target {target.path}, and room is kept for {kept}; --enable_expert_lora keeps "
                "it for experts, --enable_tower_connector_lora for the vision tower and the connector"
            )
        if one.rank > room.rank:
            raise UserError(f"adapter {name!r} has rank {one.rank}, and room is kept for rank {room.rank}")
        if one.magnitude is not None or one.bias is not None:
            raise UserError(f"adapter {name!r} has magnitudes or biases (DoRA, lora_bias), for which no room is kept")


def _check(name: str, weights: AdapterWeights) -> None:
    whole = sorted({target.path for target in weights.parameters} | set(weights.token_rows))
    if whole:
        raise UserError(
            f"adapter {name!r} brings whole parameters ({whole[0]}, ...), which sequences side by side cannot "
            "have each for itself: merge it into its base and serve that"
        )
    if any(target.path == HEAD for target in weights.low_rank):
        raise UserError(f"adapter {name!r} is on {HEAD}; several adapters at once take none on a head")


def _choice(
    path: str, base: base_matrices.Matrix, adapters: Sequence[AdapterWeights | None], rank: int | None
) -> AdapterChoice:
    """Return the adapters of a matrix; ``rank`` None is the largest of theirs."""
    *lead, d_in, d_out = base.shape
    there = [weights for weights in adapters if weights is not None]
    present = [one for weights in there for target, one in weights.low_rank.items() if target.path == path]
    rank, n = rank or max(one.rank for one in present), len(adapters) + 1
    arrays = {
        "a": np.zeros((*lead, n, d_in, rank), np.float32),
        "b": np.zeros((*lead, n, rank, d_out), np.float32),
        "factor": np.ones((*lead, n, d_out), np.float32) if any(o.magnitude is not None for o in present) else None,
        "bias": np.zeros((*lead, n, d_out), np.float32) if any(o.bias is not None for o in present) else None,
    }
    for number, weights in enumerate(adapters, 1):
        if weights is None:
            continue
        for index in np.ndindex(tuple(lead)):
            one = weights.low_rank.get(Target(path, index))
            if one is not None:
                at = (*index, number)
                arrays["a"][at][:, : one.rank] = one.a
                arrays["b"][at][: one.rank] = one.scale * one.b
                if one.magnitude is not None:
                    arrays["factor"][at] = _factor(one, base.read(index))
                if one.bias is not None:
                    arrays["bias"][at] = one.scale * one.bias
    axes = _axes_of(base)
    made = {
        name: None if value is None else AdapterConstant(jnp.asarray(value), axes=axes[name])
        for name, value in arrays.items()
    }
    return AdapterChoice(**made, axes=base.axes[-2:])


def _factor(one: LowRank, kernel: np.ndarray) -> np.ndarray:
    """Return magnitude / norm, summed in float64."""
    total = kernel.astype(np.float64) + one.scale * (one.a.astype(np.float64) @ one.b.astype(np.float64))
    return one.magnitude / np.sqrt(np.square(total).sum(0))


def numbers(known: Any, names: Sequence[str | None]) -> Int[np.ndarray, " B"] | None:
    """Return the number of each request's adapter; None for a model that has no choice of them.

    Args:
      known: `VLM.adapters` of the model.

    Raises:
      UserError: a name that the model does not have.
    """
    if not isinstance(known, AdapterNames):
        named = next((name for name in names if name is not None), None)
        if named is not None:
            raise UserError(f"a request names the adapter {named!r}, and the model was loaded without adapters by name")
        return None
    return np.array([known.number(name) for name in names], np.int32)


def names_of(text: Sequence[str]) -> dict[str, str]:
    """Return name -> folder of options "name=folder". Raises UserError for others and for a name given twice."""
    folders: dict[str, str] = {}
    for word in text:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name in folders:
            raise UserError(f"--adapters {word}: write name=folder, each name once: --adapters a=runs/one b=runs/two")
        folders[name] = folder
    return folders


def load(model: VLM, folders_by_name: Mapping[str, Any]) -> VLM:
    """Return `stacked` of the adapters in folders, as `jvlm.adapters.folders.read` reads them."""
    return stacked(model, {name: folders.read(folder, model.config) for name, folder in folders_by_name.items()})


def content_keys(model: VLM) -> dict[str, tuple[bytes, bytes]]:
    """Return, for each adapter of a model, hashes of its tensors, and of those that change the vision tower.

    What was computed with an adapter is the same wherever these are, whatever the adapter is called. The second is
    empty where the adapter leaves encoder and connector alone.
    """
    if not isinstance(model.adapters, AdapterNames):
        return {}
    choices = [(".".join(map(str, path)), part) for path, part in nnx.iter_modules(model)]
    choices = sorted((c for c in choices if isinstance(c[1], AdapterChoice)), key=lambda c: c[0])
    keys = {}
    for name in filter(None, model.adapters.names):
        number, everything, vision = model.adapters.number(name), hashlib.sha256(), hashlib.sha256()
        sees = False
        for path, part in choices:
            own = {"a": 3, "b": 3, "factor": 2, "bias": 2}
            arrays = [(field, getattr(part, field), axes) for field, axes in own.items()]
            digest = hashlib.sha256(path.encode())
            for field, value, axes in arrays:
                if value is not None:
                    held = np.ascontiguousarray(np.take(np.asarray(value[...]), number, axis=value[...].ndim - axes))
                    digest.update(f"{field}{held.dtype.str}{held.shape}".encode() + held.tobytes())
            everything.update(digest.digest())
            if not path.startswith("decoder"):
                vision.update(digest.digest())
                sees = True
        keys[name] = everything.digest(), vision.digest() if sees else b""
    return keys
