"""Frozen parameters of a run: compared with the folder they come from, or stored in the run once."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jvlm.data import stores
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.quantization.kernels import is_part
from jvlm.training.run_storage import RunStorage
from jvlm.training.state import Params, TrainState
from jvlm.weights import frozen, run_dir
from jvlm.weights.fingerprints import NEWEST, fingerprints
from jvlm.weights.frozen import FrozenRecord


class FrozenParameters:
    """What a run's checkpoints leave out, and where it is.

    Args:
      base: folder whose parameters the model has unchanged, as the experiment names it; None where the model began at
        random or was adapted: then its frozen parameters are in no folder, and are written to the run.
      full: whether checkpoints hold them, so that nothing needs to be recorded.
    """

    def __init__(self, storage: RunStorage, base: str | None, *, full: bool):
        self.storage, self.base, self.full = storage, base, full
        self.digest: str | None = None  # fingerprint of all of them, once it is known

    def restore(self, state: TrainState) -> TrainState:
        """Return the state with the frozen parameters that the run began with.

        Raises:
          UserError: the folder they come from has changed since; names both fingerprints.
        """
        record = hosts.broadcast_from_0(_values(self.storage.folder))
        if record is None or not state.frozen_base:
            return state
        record = FrozenRecord(**record)
        self.digest = record.digest
        if record.base is None:
            wanted = {
                p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for p, v in state.frozen_base.items()
            }
            params = self.storage.store / frozen.STORED / "params"
            return dataclasses.replace(state, frozen={**state.frozen, **run_dir.read_arrays(params, wanted)})
        record.check(_fingerprints(state.frozen_base, record.version), self.storage.folder)
        return state

    def check(self, digest: str | None) -> None:
        """Raise UserError if a checkpoint was trained on other frozen parameters than the run now has."""
        if digest is not None and digest != self.digest:
            raise UserError(
                f"{self.storage.folder / frozen.RECORD} is missing, or of another run: the last checkpoint was trained "
                f"on frozen parameters of fingerprint {digest}, and here it is {self.digest}. Restore the file"
            )

    def record(self, state: TrainState) -> None:
        """Note where the frozen parameters are, and write them to the run if they are nowhere else."""
        if not state.frozen_base or self.full:
            return
        folder = self.storage.folder
        known = hosts.broadcast_from_0(_values(folder))
        if known is not None and (known["base"] is None or self.base is None):
            return
        base = self._base() if self.base is not None else {"base": None, "step": None}
        if known is not None and {name: known[name] for name in base} == base:
            return
        dtype = str(next(v for p, v in state.frozen_base.items() if not is_part(p)).dtype)
        # checkpoints name the digest of the record: one that is written anew has numbers of the same version
        version = NEWEST if known is None else FrozenRecord(**known).version
        prints = _fingerprints(state.frozen_base, version)
        record = FrozenRecord(**base, param_dtype=dtype, fingerprints=prints)
        if self.base is None:
            self._store(state.frozen_base)
        self.digest = record.digest
        if hosts.is_rank0():
            record.write(folder)
        hosts.barrier("noted where the frozen parameters are")

    def _base(self) -> dict[str, str | int | None]:
        local = run_dir.local(self.base)
        step = run_dir.steps(local)[-1] if run_dir.is_run(local) else None
        if stores.is_remote(self.base):
            return {"base": self.base, "step": step}
        base, run = Path(self.base).absolute(), self.storage.folder.absolute()
        # a stage lies inside the run of its experiment, and moves with it
        if run in base.parents or (run.parent.name == "stages" and run.parent in base.parents):
            relative = os.path.relpath(base, run)
            return {"base": self.storage.elsewhere(relative) or relative, "step": step}
        return {"base": str(base), "step": step}

    def _store(self, values: Params) -> None:
        folder = self.storage.store / frozen.STORED
        if hosts.is_rank0() and folder.exists():
            folder.rmtree()  # one that was not finished: it has no record
        hosts.barrier("about to write the frozen parameters")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", values)
        prints = fingerprints((values,))
        if hosts.is_rank0():
            path = folder / run_dir.FINGERPRINTS
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"fingerprints": prints}) + "\n")


def _values(folder: Path) -> dict | None:
    record = frozen.read(folder) if hosts.is_rank0() else None
    return None if record is None else dataclasses.asdict(record)


def _fingerprints(values: Params, version: int) -> dict[str, int]:
    return dict(zip(values, fingerprints(list(values.values()), version=version).values(), strict=True))
