"""The frozen parameters of a run, which its checkpoints do not hold: from another folder, or stored in the run once.

frozen.json          which folder they are in, at which step if it is a run, and the fingerprint of each
frozen/params        Orbax; where they are in no other folder
       data          their fingerprints
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from jvlm import json_files
from jvlm.data import stores
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLMConfig
from jvlm.weights import hf, run_dir, safetensors_files, table
from jvlm.weights.fingerprints import Running, digest, fingerprints, version_of

RECORD, STORED = "frozen.json", "frozen"


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    """Where the frozen parameters of a run are, and what they were when it began.

    Attributes:
      base: folder or address of the model they come from, relative to the run if it is inside; None: ``<run>/frozen``.
      step: of the base, if that is a run.
      param_dtype: of the run's parameters, which the fingerprints are of.
      fingerprints: of each, by path.
    """

    base: str | None
    step: int | None
    param_dtype: str
    fingerprints: dict[str, int]

    @property
    def version(self) -> int:
        """Which the fingerprints are of."""
        return version_of(self.fingerprints.values())

    @property
    def digest(self) -> str:
        """One fingerprint of all of them."""
        return digest(self.fingerprints)

    def write(self, folder: Path) -> None:
        """Write frozen.json, whole or not at all."""
        values = {**dataclasses.asdict(self), "digest": self.digest}
        beside = folder / f".{RECORD}.part"
        beside.write_text(json.dumps(values, indent=2) + "\n")
        beside.replace(folder / RECORD)

    def check(self, now: Mapping[str, int], folder: Path) -> None:
        """Raise UserError, naming both fingerprints, if these are not the frozen parameters of the run."""
        if dict(now) == self.fingerprints:
            return
        changed = sorted(p for p in {*now, *self.fingerprints} if now.get(p) != self.fingerprints.get(p))
        raise UserError(
            f"{folder} was trained on frozen parameters from {self.base}, which have changed: fingerprint "
            f"{self.digest} when the run began, {digest(now)} now ({len(changed)} parameters, first {changed[0]}). Put "
            "that folder back as it was, or train another run; checkpoint.full stores them with each checkpoint"
        )


def read(folder: Path) -> FrozenRecord | None:
    """Return what a run says about its frozen parameters; None if it has none. Raises UserError if it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    return table.read_values(path, _record, json_files.read_object(path))


def _record(values: dict[str, Any]) -> FrozenRecord:
    return FrozenRecord(**{f.name: values[f.name] for f in dataclasses.fields(FrozenRecord)})


def base_folder(folder: Path, record: FrozenRecord) -> str | Path:
    """Return the folder or address that a run's frozen parameters come from."""
    return record.base if stores.is_remote(record.base) else folder / record.base


def read_all(
    folder: Path, source: epath.Path, config: VLMConfig, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return all parameters of a run: those of a checkpoint, and the frozen ones from where they are.

    Args:
      source: ``params`` of the checkpoint.
      config: of the model, with the precision that is wanted.

    Raises:
      WeightError: as `run_dir.read_arrays`. UserError: the folder of the frozen ones is gone or has changed.
    """
    missing = set(wanted) - run_dir.stored_paths(source)
    record = read(folder)
    if record is None or missing != set(record.fingerprints):
        missing = set()  # a checkpoint that holds everything, or should: what it lacks is listed
    values = run_dir.read_arrays(source, {p: want for p, want in wanted.items() if p not in missing})
    if not missing:
        return values
    rest = {p: wanted[p] for p in wanted if p in missing}
    if record.base is None:
        return values | run_dir.read_arrays(_stored(folder), rest)
    return values | _from_base(folder, record, config, rest)


def _stored(folder: Path) -> epath.Path:
    return run_dir.checkpoints(folder).parent / STORED / "params"


def _from_base(
    folder: Path, record: FrozenRecord, config: VLMConfig, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    from jvlm.weights import io  # which reads runs through this module

    precision = dataclasses.replace(config.precision, param_dtype=record.param_dtype)
    with _present(folder, record):
        model, _ = io.load(
            base_folder(folder, record),
            precision=precision,
            sharding=lambda path, _: wanted[path].sharding if path in wanted else _first_device(),
            step=record.step,
            quantize=run_dir.quantization(folder),
        )
    base_values = {path: v.get_value() for path, v in vlm.parameters(model).items() if path in wanted}
    now = fingerprints(list(base_values.values()), version=record.version).values()
    record.check(dict(zip(base_values, now, strict=True)), folder)
    return {path: value.astype(wanted[path].dtype) for path, value in base_values.items()}


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@contextlib.contextmanager
def _present(folder: Path, record: FrozenRecord) -> Iterator[None]:
    """Say what to do where the folder of frozen parameters is not there."""
    try:
        yield
    except UserError as error:
        at = f" at step {record.step}" if record.step is not None else ""
        raise UserError(
            f"{folder} was trained on frozen parameters from {record.base}{at}, which cannot be loaded ({error}). Put "
            f'that folder back, or write its new path as "base" into {folder / RECORD}: its fingerprint '
            f"{record.digest} is compared"
        ) from error


class ParameterReader(Protocol):
    """Gives parameters as host arrays, one at a time or one layer at a time."""

    def dtype(self, path: str) -> np.dtype: ...

    def read(self, path: str, layer: int | None = None) -> np.ndarray: ...

    def close(self) -> None: ...


def open_run(folder: Path, shapes: Mapping[str, tuple[int, ...]], step: int | str | None = None) -> ParameterReader:
    """Return a reader of all parameters of a run at a step (None: the latest), frozen ones included.

    Each parameter is checked against its fingerprint once all of it was read, layers in order.

    Raises:
      WeightError: missing, extra or wrongly shaped parameters. UserError: as `read_all`.
    """
    if run_dir.quantization(folder) is not None:
        raise UserError(
            f"{folder} was trained on a quantised base, which has no parameters in a plain dtype: merge its adapter "
            "into the model that it was made from, or into its dequantised weights (jvlm export)"
        )
    params = run_dir.params_folder(folder, step)
    record = read(folder)
    stored = run_dir.stored_paths(params)
    missing = {path for path in shapes if path not in stored}
    if record is None or missing != set(record.fingerprints):
        return run_dir.Arrays(params, shapes, run_dir.saved_fingerprints(params.parent))
    trained = {p: s for p, s in shapes.items() if p not in missing}
    rest = {p: s for p, s in shapes.items() if p in missing}
    readers: list[tuple[Mapping[str, Any], ParameterReader]] = [
        (trained, run_dir.Arrays(params, trained, run_dir.saved_fingerprints(params.parent)))
    ]
    if record.base is None:
        source = _stored(folder)
        readers.append((rest, run_dir.Arrays(source, rest, run_dir.saved_fingerprints(source.parent))))
    else:
        with _present(folder, record):
            readers.append((rest, _BaseReader(folder, record, shapes)))
    return _Joined(readers)


class _Joined:
    """Several readers as one."""

    def __init__(self, readers: list[tuple[Mapping[str, Any], ParameterReader]]):
        self._readers = readers
        self._by_path = {path: reader for paths, reader in readers for path in paths}

    def dtype(self, path: str) -> np.dtype:
        return self._by_path[path].dtype(path)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        return self._by_path[path].read(path, layer)

    def close(self) -> None:
        for _, reader in self._readers:
            reader.close()


class _BaseReader:
    """Parameters of the folder that a run refers to, in the run's dtype."""

    def __init__(self, folder: Path, record: FrozenRecord, shapes: Mapping[str, tuple[int, ...]]):
        self.folder, self.record = folder, record
        base = run_dir.local(base_folder(folder, record))
        if not base.is_dir():
            raise UserError(f"{base} is not a folder")
        self._shapes, self._running = shapes, {}
        self._run = open_run(base, shapes, record.step) if run_dir.is_run(base) else None
        self._tensors = None
        if self._run is None:
            config = hf.read_config(base, run_dir.model_config(folder).precision)
            entries = table.entries(config, dict(shapes))
            self._tensors = safetensors_files.Tensors(base)
            form = table.hf_format(config)
            self._tensors.split(form.fused)
            self._stored = hf.match(self._tensors, form.canonical, entries)
            self._entries: dict[tuple[str, int | None], table.Entry] = {(e.path, e.layer): e for e in entries}

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self.record.param_dtype)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        value = self._read(path, layer)
        count = self._shapes[path][0] if layer is not None else 1
        done, running = self._running.pop(path, (0, None))
        if running is None or not layer:
            done, running = 0, Running(self.record.version)
        if layer is None or layer == done:  # in order; a parameter read otherwise is not compared
            running.add(value)
            if done + 1 < count:
                self._running[path] = done + 1, running
            else:
                expected = {path: self.record.fingerprints[path]}
                if running.value != expected[path]:
                    self.record.check({**self.record.fingerprints, path: running.value}, self.folder)
        return value

    def _read(self, path: str, layer: int | None) -> np.ndarray:
        if self._run is not None:
            return self._run.read(path, layer).astype(self.dtype(path))
        if layer is not None or (path, None) in self._entries:
            return self._tensor(path, layer)
        return np.stack([self._tensor(path, number) for number in range(self._shapes[path][0])])

    def _tensor(self, path: str, layer: int | None) -> np.ndarray:
        entry = self._entries[path, layer]
        return np.ascontiguousarray(entry.to_param(self._tensors.read(self._stored[entry.name])), self.dtype(path))

    def close(self) -> None:
        for opened in (self._run, self._tensors):
            if opened is not None:
                opened.close()
