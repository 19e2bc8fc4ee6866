"""Checkpoints of a run: trained parameters, optimizer and data position together, written in the background by Orbax.

Frozen parameters are not in them (unless `CheckpointConfig.full`): the run refers to where they are, see
`jvlm.weights.frozen`.

Beside the data position lie fingerprints of all arrays, taken on the devices before they are written. They are compared
with what is read, on whatever mesh: a checkpoint that is restored is the one that was saved, to the bit.

Each process reads its parts without waiting for the others, and then all hear what each has met: where one finds a step
damaged, all go on to the one before, and none waits for a process that has failed.
"""

from __future__ import annotations

import dataclasses
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
from jvlm.training.optimizer import ema_of
from jvlm.training.state import TrainState
from jvlm.units import GIB
from jvlm.weights.fingerprints import fingerprints, version_of
from jvlm.weights.run_dir import CHECKPOINTS, by_itself, cause, lies_elsewhere

DAMAGED = "damaged"
T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint whose files are missing, cut short or changed."""


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write.

    A checkpoint exists whole or not at all: Orbax writes beside it and renames, and the oldest one goes only after.

    Args:
      folder: of the run, absolute or in an object store.
      use_ema: where the optimizer keeps an average of the parameters, a checkpoint gives it to whoever loads the run;
        the parameters themselves lie beside the optimizer's state.

    Attributes:
      best: the step whose checkpoint stays whatever comes later; None for none.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig, *, use_ema: bool = True):
        self.folder, self.config, self.use_ema = epath.Path(folder), config, use_ema
        self.best: int | None = None
        self._path = self.folder / CHECKPOINTS
        for path in sorted(self._path.iterdir()) if self._path.is_dir() else ():
            if not ocp.utils.is_checkpoint_finalized(path):
                hosts.log_rank0(f"removing {path}: a checkpoint that was being written when the run ended")
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=config.save_interval_steps,
                preservation_policy=_Preserved(config.max_to_keep, self._stays),
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
        """Return the last complete step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def check_space(self, state: TrainState, ahead: Sequence[int], *, more: int = 0) -> None:
        """Check that the disk has room for the checkpoints that will lie on it at a time; asks local disks only.

        Args:
          ahead: steps that will be run.
          more: checkpoints beside those that the configuration keeps: the best one.

        Raises:
          UserError: it has not, with both numbers.
        """
        if stores.is_remote(self.folder) or not ahead:
            return
        size = sum(x.nbytes for x in jax.tree.leaves(self._parts(state, full=self.config.full)))
        config, present = self.config, self._manager.all_steps()
        passing = sum(not self._stays(step) for step in present)
        count = most = 0
        first = () if present else (ahead[0],)  # Orbax always writes the first step of a run
        for step in (s for s in ahead if s % config.save_interval_steps == 0 or s == ahead[-1] or s in first):
            count, passing = count + 1, passing + (not self._stays(step))
            most = max(most, count)  # the oldest goes only when the new one is whole
            if passing > config.max_to_keep:
                count, passing = count - 1, passing - 1
        free = shutil.disk_usage(self._path).free
        if (most + more) * size > free:
            raise UserError(
                f"{self._path} has {free / GIB:.2f} GiB free, but {most + more} more checkpoints of "
                f"{size / GIB:.2f} GiB will lie there at a time; make room, or lower checkpoint.max_to_keep = "
                f"{config.max_to_keep} or raise checkpoint.keep_period = {config.keep_period}"
            )

    def _stays(self, step: int) -> bool:
        return step == self.best or (self.config.keep_period is not None and step % self.config.keep_period == 0)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after this step."""
        return self._manager.should_save(step)

    def save(self, step: int, state: TrainState, data: dict[str, Any], *, force: bool = False) -> bool:
        """Write a checkpoint if it is due (or ``force``), and return whether it was. Arrays are copied before that."""
        if (force and self.latest() == step) or not (force or self.due(step)):
            return False
        params, rest = self._parts(state, full=self.config.full)
        prints = fingerprints((params, rest))
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params, save_args={p: _chunks(p, v) for p, v in params.items()}),
                optimizer=ocp.args.StandardSave(rest),
                data=ocp.args.JsonSave({"run": data, "checksum": _checksum(data), "fingerprints": prints}),
            ),
            force=force,
        )

    def _parts(self, state: TrainState, *, full: bool) -> tuple[dict[str, jax.Array], Any]:
        """Return (parameters as whoever loads the run gets them, what else training goes on from)."""
        params = state.params if full else state.saved
        average = ema_of(state.opt_state, state.trainable) if self.use_ema else None
        if average is None:
            return params, state.opt_state
        return {**params, **average}, {"optimizer": state.opt_state, "trained": state.trainable}

    def restore_latest(self, state: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Return the last good checkpoint: its step, state and data; None if there is none.

        Arrays come in the shapes and shardings of those given, however they were laid out when saved. Frozen ones
        that the checkpoint does not hold are those given. Steps that are damaged are named and moved to
        ``<run>/damaged``.

        Raises:
          UserError: there are checkpoints, and every one is damaged.
        """
        problems = []
        for step in hosts.broadcast_from_0(sorted(self._manager.all_steps(), reverse=True)):
            try:
                return (step, *self.restore(step, state))
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

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """As `restore_latest`, of one step. Raises Damaged: on every process, whichever found it so."""
        data, params, rest = _agreed(lambda: self._read(step, state))
        now = fingerprints((params, rest), version=version_of(data["fingerprints"].values()))
        _agreed(lambda: _compare(data["fingerprints"], now))
        averaged = self.use_ema and ema_of(state.opt_state, state.trainable) is not None
        opt_state, trained = (rest["optimizer"], rest["trained"]) if averaged else (rest, params)
        restored = dataclasses.replace(
            state,
            step=state.step * 0 + step,
            trainable={path: trained[path] for path in state.trainable},
            opt_state=opt_state,
            frozen={path: params.get(path, value) for path, value in state.frozen.items()},
        )
        return restored, data["run"]

    def _read(self, step: int, state: TrainState) -> tuple[dict[str, Any], dict[str, jax.Array], Any]:
        """Return this process's parts of the arrays, and the data. Communicates with nobody. Raises Damaged."""
        unreadable = ""
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=by_itself()) as reader:
                path = self._path / str(step)
                data = reader.restore(path, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
                if not isinstance(data, dict) or "run" not in data or _checksum(data["run"]) != data.get("checksum"):
                    raise Damaged("the data position is not what was saved")
                full = all(f"[0][{path!r}]" in data["fingerprints"] for path in state.frozen_base)
                wanted = self._parts(state, full=full)
                wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
                arrays = ocp.args.Composite(
                    params=ocp.args.StandardRestore(wanted[0]), optimizer=ocp.args.StandardRestore(wanted[1])
                )
                restored = reader.restore(path, args=arrays)
        except Damaged:
            raise
        except Exception as error:  # Orbax raises no less for a file that is cut short
            if lies_elsewhere(error):
                raise
            unreadable = f"it cannot be read ({cause(error)})"
        if unreadable:  # raised here, because the error holds Orbax's other reads, which it has left unfinished
            raise Damaged(unreadable)
        return data, restored.params, restored.optimizer

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


@dataclasses.dataclass(frozen=True)
class _Preserved:
    """Orbax's preservation policy: the latest checkpoints, and those that stay."""

    latest: int
    stays: Callable[[int], bool]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        first = len(checkpoints) - self.latest
        return [number >= first or self.stays(checkpoint.step) for number, checkpoint in enumerate(checkpoints)]


def _agreed(work: Callable[[], T]) -> T:
    """As `hosts.run_on_all`; but what one process finds damaged is Damaged for all."""

    def judge() -> tuple[T | None, str | None]:
        try:
            return work(), None
        except Damaged as error:
            return None, str(error)

    result, damage = hosts.run_on_all(judge)
    reports = hosts.all_gather_object(damage)
    for process, text in enumerate(reports):
        if text is not None:
            raise Damaged(text if len(reports) == 1 else f"process {process} says: {text}")
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
