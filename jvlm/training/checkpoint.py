"""Checkpoints of a run: parameters, optimizer and data position together, written in the background by Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jvlm.training.config import CheckpointConfig
from jvlm.training.step import Params, TrainState
from jvlm.weights.run_folder import CHECKPOINTS


class Checkpoints:
    """The checkpoints of one run folder. Use as a context manager: leaving it waits for the last write.

    A checkpoint exists whole or not at all: Orbax writes beside it and renames.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._manager = ocp.CheckpointManager(
            (folder / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=config.every,
                max_to_keep=config.keep,
                keep_period=config.keep_every,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_names=("params", "optimizer", "data"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        """The last complete step."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return self._manager.should_save(step)

    def save(self, step: int, state: TrainState, frozen: Params, data: dict[str, Any], *, force: bool = False) -> bool:
        """Write if it is time to (or ``force``); returns whether it was. Arrays are copied before this returns."""
        if force and self.latest() == step:
            return False
        params = {**frozen, **state.params}
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params, save_args={p: _chunks(p, v) for p, v in params.items()}),
                optimizer=ocp.args.StandardSave(state.optimizer),
                data=ocp.args.JsonSave(data),
            ),
            force=force,
        )

    def restore(self, step: int, state: TrainState, frozen: Params) -> tuple[TrainState, Params, dict[str, Any]]:
        """The state at a step, in the shapes and shardings of the given one, and the data position."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, ({**frozen, **state.params}, state.optimizer))
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract[0]),
                optimizer=ocp.args.StandardRestore(abstract[1]),
                data=ocp.args.JsonRestore(),
            ),
        )
        params = {path: found.params[path] for path in state.params}
        restored = TrainState(state.step + step, params, found.optimizer)
        return restored, {path: found.params[path] for path in frozen}, found.data


def _chunks(path: str, value: jax.Array) -> ocp.SaveArgs:
    """Stacked parameters are stored a layer to a chunk, so that a converter need not read more than one.

    Small ones are not: chunks under a MiB only cost time.
    """
    if ".layer." not in path or value.nbytes < value.shape[0] * 2**20:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=value.nbytes // value.shape[0], shard_axes=(0,))
