"""Which sequences of a global batch each process reads, and the global batch made of what they read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch


@dataclasses.dataclass(frozen=True)
class DataShard:
    """The part of every global batch that one process reads.

    Attributes:
      sequences: indices of the packed sequences in the global batch that its devices hold, or hold a part of.
      index, count: number of this shard, from 0, and of all shards. They have equal sizes.
      is_primary_reader: whether this is the first process that reads this shard. Others read it too where the tokens
        of a sequence are split over processes; only the primary reader counts and saves what was read.
    """

    sequences: tuple[int, ...]
    index: int
    count: int
    is_primary_reader: bool


def data_shard_for(tokens: jax.ShapeDtypeStruct) -> DataShard:
    """Return the shard of this process.

    Args:
      tokens: shape [accumulation steps, sequences, tokens] and sharding of a step's tokens.

    Raises:
      UserError: shards of different processes that overlap without being the same.
    """
    held: dict[int, set[int]] = {}
    for device, index in tokens.sharding.devices_indices_map(tokens.shape).items():
        held.setdefault(device.process_index, set()).update(range(*index[1].indices(tokens.shape[1])))
    shards = {process: tuple(sorted(sequences)) for process, sequences in sorted(held.items())}
    distinct = sorted(set(shards.values()))
    if len({len(sequences) for sequences in distinct}) > 1 or sum(map(len, distinct)) != tokens.shape[1]:
        raise UserError(f"the mesh gives processes sequences that overlap in part: {shards}; choose other axis sizes")
    sequences = shards[jax.process_index()]
    primary = next(process for process, others in shards.items() if others == sequences)
    return DataShard(sequences, distinct.index(sequences), len(distinct), primary == jax.process_index())


def local_sequences(batch: Any, shard: DataShard) -> Any:
    """Return the sequences of a process, of host arrays [sequences, ...] that every process has whole."""
    return jax.tree.map(lambda x: x[np.asarray(shard.sequences)], batch)


def make_global_batch(batches: PackedBatch, shard: DataShard, shapes: PackedBatch) -> PackedBatch:
    """Return the global batch as device arrays.

    Args:
      batches: host arrays [accumulation steps, sequences of this shard, ...].
      shapes: shape and sharding of the global batch.
    """
    local = {sequence: index for index, sequence in enumerate(shard.sequences)}

    def make(value: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            wanted = [local[sequence] for sequence in range(*index[1].indices(shape.shape[1]))]
            return value[index[0]][:, wanted[0] : wanted[-1] + 1][(slice(None), slice(None), *index[2:])]

        return jax.make_array_from_callback(shape.shape, shape.sharding, read)

    return jax.tree.map(make, batches, shapes)
