"""Checkpoints of a run: parameters, optimizer and data position together, written in the background by Orbax.

Beside the data position lie fingerprints of all arrays, taken on the devices before they are written. They are compared
with what is read, on whatever mesh: a checkpoint that is restored is the one that was saved, to the bit.

Each process reads its parts without waiting for the others, and then all hear what each has met: where one finds a step
damaged, all go on to the one before, and none waits for a process that has failed.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from jvlm.data import stores
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.training.config import CheckpointConfig
from jvlm.training.train_step import Params, TrainState
from jvlm.weights.fingerprints import fingerprints
from jvlm.weights.run_dir import CHECKPOINTS, by_itself, cause, lies_elsewhere

DAMAGED = "damaged"
GIB = 2**30
T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint whose files are missing, cut short or changed."""


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write.

    A checkpoint exists whole or not at all: Orbax writes beside it and renames, and the oldest one goes only after.

    Args:
      folder: of the run, absolute or in an object store.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        self.folder, self.config = epath.Path(folder), config
        self._path = self.folder / CHECKPOINTS
        for path in sorted(self._path.iterdir()) if self._path.is_dir() else ():
            if not ocp.utils.is_checkpoint_finalized(path):
                hosts.log_rank0(f"removing {path}: a checkpoint that was being written when the run ended")
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=config.save_interval_steps,
                max_to_keep=config.max_to_keep,
                keep_period=config.keep_period,
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

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The last complete step."""
        return self._manager.latest_step()

    def check_space(self, state: TrainState, frozen: Params, ahead: Sequence[int]) -> None:
        """Whether the disk has room for the checkpoints that will lie on it at a time; asks local disks only.

        Args:
          ahead: steps that will be run.

        Raises:
          UserError: it has not, with both numbers.
        """
        if stores.is_remote(self.folder):
            return
        size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer, frozen)))
        config, present = self.config, self._manager.all_steps()
        if not ahead:
            return
        passing = sum(not self._stays(step) for step in present)
        more = most = 0
        first = () if present else (ahead[0],)  # Orbax always writes the first step of a run
        for step in (s for s in ahead if s % config.save_interval_steps == 0 or s == ahead[-1] or s in first):
            more, passing = more + 1, passing + (not self._stays(step))
            most = max(most, more)  # the oldest goes only when the new one is whole
            if passing > config.max_to_keep:
                more, passing = more - 1, passing - 1
        free = shutil.disk_usage(self._path).free
        if most * size > free:
            raise UserError(
                f"{self._path} has {free / GIB:.2f} GiB free, but {most} more checkpoints of {size / GIB:.2f} GiB will "
                f"lie there at a time; make room, or lower checkpoint.max_to_keep = {config.max_to_keep} or raise "
                f"checkpoint.keep_period = {config.keep_period}"
            )

    def _stays(self, step: int) -> bool:
        return self.config.keep_period is not None and step % self.config.keep_period == 0

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return self._manager.should_save(step)

    def save(self, step: int, state: TrainState, frozen: Params, data: dict[str, Any], *, force: bool = False) -> bool:
        """Write if it is time to (or ``force``); returns whether it was. Arrays are copied before this returns."""
        if (force and self.latest() == step) or not (force or self.due(step)):
            return False
        params = {**frozen, **state.params}
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params, save_args={p: _chunks(p, v) for p, v in params.items()}),
                optimizer=ocp.args.StandardSave(state.optimizer),
                data=ocp.args.JsonSave(
                    {"run": data, "checksum": _checksum(data), "fingerprints": fingerprints((params, state.optimizer))}
                ),
            ),
            force=force,
        )

    def restore_latest(
        self, state: TrainState, frozen: Params
    ) -> tuple[int, TrainState, Params, dict[str, Any]] | None:
        """The last good checkpoint: its step, state and frozen parameters, and data position; None if there is none.

        Arrays come in the shapes and shardings of those given, however they were laid out when saved. Steps that are
        damaged are named and put aside, in ``<run>/damaged``.

        Raises:
          UserError: there are checkpoints, and every one is damaged.
        """
        problems = []
        for step in hosts.broadcast_from_0(sorted(self._manager.all_steps(), reverse=True)):
            try:
                return (step, *self.restore(step, state, frozen))
            except Damaged as error:
                problems.append(f"step {step}: {error}")
                target = self._put_aside(step, str(error))
                hosts.log_rank0(f"CHECKPOINT DAMAGED, put aside in {target}: {problems[-1]}")
        if problems:
            raise UserError(
                f"every checkpoint of {self.folder} is damaged:\n  "
                + "\n  ".join(problems)
                + f"\nThey are in {self.folder / DAMAGED}. Nothing is left to go on from: the same command starts anew"
            )
        return None

    def restore(self, step: int, state: TrainState, frozen: Params) -> tuple[TrainState, Params, dict[str, Any]]:
        """As `restore_latest`, of one step. Raises Damaged: on every process, whichever found it so."""
        found = _agreed(lambda: self._read(step, state, frozen))
        now = fingerprints((found.params, found.optimizer))
        saved = found.data["fingerprints"]
        _agreed(lambda: _compare(saved, now))
        params = {path: found.params[path] for path in state.params}
        restored = TrainState(state.step + step, params, found.optimizer)
        return restored, {path: found.params[path] for path in frozen}, found.data["run"]

    def _read(self, step: int, state: TrainState, frozen: Params) -> Any:
        """This process's parts of the arrays, and the data position. Communicates with nobody. Raises Damaged."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, ({**frozen, **state.params}, state.optimizer))
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract[0]),
            optimizer=ocp.args.StandardRestore(abstract[1]),
            data=ocp.args.JsonRestore(),
        )
        unreadable = ""
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=by_itself()) as reader:
                found = reader.restore(self._path / str(step), args=wanted)
        except Exception as error:  # Orbax raises no less for a file that is cut short
            if lies_elsewhere(error):
                raise
            unreadable = f"it cannot be read ({cause(error)})"
        if unreadable:  # said here, because the error holds Orbax's other reads, which it has left unfinished
            raise Damaged(unreadable)
        data = found.data
        if not isinstance(data, dict) or "run" not in data or _checksum(data["run"]) != data.get("checksum"):
            raise Damaged("the data position is not what was saved")
        return found

    def _put_aside(self, step: int, reason: str) -> epath.Path:
        target = self.folder / DAMAGED / str(step)
        if hosts.is_rank0():
            number = 1
            while target.exists():
                number += 1
                target = self.folder / DAMAGED / f"{step}-{number}"
            target.parent.mkdir(parents=True, exist_ok=True)
            # before the arrays: a folder in an object store is there once something lies in it
            (target.parent / f"{target.name}.txt").write_text(reason + "\n")
            (self._path / str(step)).rename(target)
        hosts.barrier(f"step {step} is put aside")
        self._manager.reload()
        return target


def _agreed(work: Callable[[], T]) -> T:
    """As `hosts.run_on_all`; but what one process finds damaged is Damaged for all."""

    def judge() -> tuple[T | None, str | None]:
        try:
            return work(), None
        except Damaged as error:
            return None, str(error)

    result, damage = hosts.run_on_all(judge)
    said = hosts.all_gather_object(damage)
    for process, text in enumerate(said):
        if text is not None:
            raise Damaged(text if len(said) == 1 else f"process {process} says: {text}")
    return result


def _compare(saved: dict[str, int], now: dict[str, int]) -> None:
    changed = sorted(k for k, v in saved.items() if now.get(k) != v)
    if changed:
        raise Damaged(f"{len(changed)} of {len(now)} arrays are not what was saved: {', '.join(changed[:5])}")


def _checksum(data: Any) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _chunks(path: str, value: jax.Array) -> ocp.SaveArgs:
    """Stacked parameters are stored a layer to a chunk, so that a converter need not read more than one.

    Small ones are not: chunks under a MiB only cost time.
    """
    if ".layer." not in path or value.nbytes < value.shape[0] * 2**20:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=value.nbytes // value.shape[0], shard_axes=(0,))
