"""Log-probabilities of answers under the reference, computed once and kept in a file: no copy, and no second pass.

The file is an npz: the numbers of the answers (`answer_number`: their tokens, which of them count, and the pixels of
their media), the sum of each answer's log-probabilities, and a fingerprint of the model that gave them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jvlm.data.mixture.examples import Examples
from jvlm.data.packing import PackedSequences
from jvlm.data.position import Share
from jvlm.data.preferences import ANSWER
from jvlm.data.processor import Processor
from jvlm.errors import UserError, file_errors
from jvlm.models import device_ops, vlm
from jvlm.models.batch import PackedBatch
from jvlm.parallel import hosts
from jvlm.parallel.data_shards import make_global_batch
from jvlm.parallel.sharded_ops import ShardedOps
from jvlm.preference import log_probs
from jvlm.training.supervised import token_log_probs
from jvlm.training.validation_data import ValidationData
from jvlm.weights.fingerprints import digest, fingerprints

if TYPE_CHECKING:
    from jvlm.training.config import Experiment
    from jvlm.training.trainer import Trainer


class Table(NamedTuple):
    """What a file holds: numbers of answers, ascending, their sums, and the fingerprint of the model."""

    numbers: Int[np.ndarray, " n"]
    sums: Float[np.ndarray, " n"]
    fingerprint: str


def lookup(packed: PackedSequences, path: str) -> Float[np.ndarray, "B N"]:
    """Return the reference's log-probability of each segment; 0 for segments that are not there.

    Raises:
      UserError: no file, or an answer that it does not hold, as when the data or its pictures have changed.
    """
    shape = packed.batch.tokens.shape
    found = np.zeros((shape[0], log_probs.room(shape[1])), np.float32)
    for row, values in enumerate(packed.values):
        if not values:
            continue
        table = _read(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)
        numbers = np.asarray([int(value[ANSWER]) for value in values], np.int64)
        places = np.minimum(np.searchsorted(table.numbers, numbers), len(table.numbers) - 1)
        unknown = np.flatnonzero(table.numbers[places] != numbers)
        if unknown.size:
            raise UserError(
                f"{packed.origins[row][unknown[0]]}: {path} does not hold this answer: the data, its pictures or the "
                "chat template have changed since it was written. Remove the file, and the run writes it again"
            )
        found[row, : len(numbers)] = table.sums[places]
    return found


@functools.lru_cache(maxsize=4)
def _read(path: str, changed: int) -> Table:
    """Return a file's table; ``changed`` says which version of it."""
    with file_errors(Path(path), "read"), np.load(path, allow_pickle=False) as stored:
        return Table(stored["numbers"], stored["sums"], str(stored["fingerprint"]))


def compute(trainer: Trainer, processor: Processor, experiment: Experiment, path: str) -> None:
    """Write the file for all examples that are trained and validated on, unless it is there.

    Every process must call it, before the first step of a start.

    Raises:
      UserError: a file that another model gave.
    """
    fingerprint = digest(fingerprints(trainer.state.params))
    if hosts.broadcast_from_0(Path(path).is_file()):
        there = hosts.broadcast_from_0(hosts.run_on_all(lambda: _read(path, Path(path).stat().st_mtime_ns).fingerprint))
        if there != fingerprint and there != digest(fingerprints(trainer.state.params, version=1)):
            raise UserError(
                f"{path} was written by another model: fingerprint {there}, and this one's is {fingerprint}. Give "
                "task.reference_file another name, or remove the file"
            )
        return
    hosts.log_rank0(f"computing the reference's log-probabilities into {path}")
    found: dict[int, float] = {}
    for data in _data_of(trainer, processor, experiment):
        found |= _log_probs(trainer, data)
    gathered = dict(map(tuple, hosts.all_gather_concat([list(pair) for pair in sorted(found.items())])))
    if hosts.is_rank0():
        numbers = np.asarray(sorted(gathered), np.int64)
        sums = np.asarray([gathered[int(n)] for n in numbers], np.float64)
        with file_errors(Path(path), "written"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            beside = Path(f"{path}.part")
            with open(beside, "wb") as file:
                np.savez(file, numbers=numbers, sums=sums, fingerprint=np.asarray(fingerprint))
            beside.replace(path)
    hosts.barrier("wrote the reference's log-probabilities")


def _data_of(trainer: Trainer, processor: Processor, experiment: Experiment) -> Iterable[ValidationData]:
    """Yield the examples of training, those held out of them included, and of validation, each once."""
    share = Share(trainer.shard.index, trainer.shard.count)
    config = experiment.data
    yield ValidationData(processor, config, Examples.open(config), share)
    if experiment.validation.data:
        other = {"train": experiment.validation.data, "mixture": None, "format": "auto"}
        changed = dataclasses.replace(config, **other)
        yield ValidationData(processor, changed, Examples.open(changed), share)


def _log_probs(trainer: Trainer, data: ValidationData) -> dict[int, float]:
    """Return number -> log-probability of this process's answers."""
    ops = ShardedOps(trainer.layout) if trainer.layout.mesh.size > 1 else None

    def sums(params: Mapping[str, Any], batch: PackedBatch) -> Float[Array, "B N"]:
        with device_ops.use(ops):
            one = jax.tree.map(lambda x: x[0], batch)
            return log_probs.by_segment(token_log_probs(vlm.bind(trainer.template, params), one), one)

    compiled = jax.jit(sums, out_shardings=trainer.layout.replicated())
    shapes, found, rows = trainer.compiled.batch.packed, {}, trainer.shard.sequences
    for packed in _in_step(data):
        local = _zeros(shapes, len(rows))
        if packed is not None:
            local = jax.tree.map(lambda x: np.asarray(x)[None], packed.batch)
        result = np.asarray(compiled(trainer.state.params, make_global_batch(local, trainer.shard, shapes)))
        for row, values in zip(rows, packed.values if packed is not None else (), strict=False):
            found |= {int(value[ANSWER]): float(result[row, n]) for n, value in enumerate(values)}
    return found


def _zeros(shapes: PackedBatch, sequences: int) -> PackedBatch:
    return jax.tree.map(lambda x: np.zeros((1, sequences, *x.shape[2:]), x.dtype), shapes)


def _in_step(batches: Iterable[PackedSequences]) -> Iterable[PackedSequences | None]:
    """Yield a process's batches, and None while others still have some."""
    own = iter(batches)
    while True:
        packed = next(own, None)
        if not any(hosts.all_gather_object(packed is not None)):
            return
        yield packed
