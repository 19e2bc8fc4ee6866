"""A jvlm run folder as a source of models.

experiment.json          the resolved experiment, model and processor included
processor/               tokenizer and settings
checkpoints/STEP/params  Orbax, dotted parameter path -> array; of a training run those that are trained
                 data    the arrays' fingerprints among others, which are compared with what is read
frozen.json, frozen/     where the frozen parameters of a training run are (`jvlm.weights.frozen`)
checkpoints.at           in the local copy of a run in an object store: where its checkpoints are
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jvlm import config as config_tree
from jvlm import json_files
from jvlm.adapters import plan as adapter_plan
from jvlm.data import stores
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.hub import downloads
from jvlm.hub.ids import is_hub_id
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.parallel import hosts
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.model import quantized, quantized_template
from jvlm.weights import hf, table, vocabulary
from jvlm.weights.fingerprints import Running, fingerprints, version_of
from jvlm.weights.table import WeightError

EXPERIMENT, CHECKPOINTS, PROCESSOR, POINTER = "experiment.json", "checkpoints", "processor", "checkpoints.at"
BEST: Literal["best"] = "best"
# in the folder of a step; Orbax's form of a JSON value, which training writes with more in it
FINGERPRINTS = "data/metadata"
# of a fingerprint's key: parameters are the first part of what training saves
_PARAMETER = re.compile(r"\[0\]\['(.*)'\]")
# Reading fails with these for reasons that lie not in the files.
_ELSEWHERE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


def local(source: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a run or of a Hugging Face model on disk: itself, or a local copy of a remote one.

    The arrays of a run stay in the store, and the copy says where. An id of the Hub is downloaded (`jvlm.hub`).

    Args:
      weights: whether the tensors of an id are wanted too.
    """
    if is_hub_id(source):
        return downloads.download(source, weights=weights)
    folder = stores.model_folder(source, (PROCESSOR,))
    if stores.is_remote(source) and is_run(folder):
        (folder / POINTER).write_text(f"{stores.at(str(source)) / CHECKPOINTS}\n")
    return folder


def is_run(folder: Path) -> bool:
    """Whether a folder is a jvlm run."""
    return (folder / EXPERIMENT).is_file()


def model_config(folder: Path, precision: Precision | None = None) -> VLMConfig:
    """Return the model configuration of a run."""
    path = folder / EXPERIMENT
    values = json_files.read_object(path)
    config = table.read_values(path, lambda v: config_tree.from_dict(VLMConfig, v["model"], "model."), values)
    return dataclasses.replace(config, precision=precision or config.precision)


def checkpoints(folder: Path) -> epath.Path:
    """Where the checkpoints of a run are, on disk or in an object store."""
    pointer = folder / POINTER
    return epath.Path(pointer.read_text().strip() if pointer.is_file() else folder.absolute() / CHECKPOINTS)


def steps(folder: Path) -> list[int]:
    """Return the steps whose checkpoints are complete, ascending."""
    folders = [p.parent for p in checkpoints(folder).glob("*/params") if p.parent.name.isdigit()]
    # on disk a step is given its name when it is whole; in a store, a file more
    return sorted(int(p.name) for p in folders if ocp.utils.is_checkpoint_finalized(p))


def split_best(folder: Path) -> tuple[Path, Literal["best"] | None]:
    """Return the run and "best" of a path that ends in the best checkpoint of a run, as ``runs/demo/best``."""
    if folder.name == BEST and not folder.exists() and is_run(folder.parent):
        return folder.parent, BEST
    return folder, None


def best_step(folder: Path) -> int:
    """Return the step of a run's best checkpoint, by its validation. Raises WeightError if there is none."""
    available = steps(folder)
    if available:
        path = checkpoints(folder) / str(available[-1]) / FINGERPRINTS
        best = json_files.read_object(path).get("run", {}).get("best") if path.exists() else None
        if best is not None and best["step"] in available:
            return best["step"]
    raise WeightError(f"{folder} has no best checkpoint: it was trained without validation, or not validated yet")


def params_folder(folder: Path, step: int | Literal["best"] | None = None) -> epath.Path:
    """Where the parameters of a step (None: the latest) are. Raises WeightError naming the steps there are."""
    available = steps(folder)
    if not available:
        raise WeightError(f"{folder} has no complete checkpoint yet")
    if step == BEST:
        step = best_step(folder)
    if step is not None and step not in available:
        raise WeightError(f"{folder} has no checkpoint of step {step}; it has {available}")
    return checkpoints(folder) / str(available[-1] if step is None else step) / "params"


def save(model: VLM, processor: Processor, folder: Path) -> None:
    """Write a model as a run folder of one checkpoint, at step 0. Raises WeightError if the folder holds a run."""
    if is_run(folder):
        raise WeightError(f"{folder} holds a run already; choose another folder")
    (folder / PROCESSOR).mkdir(parents=True, exist_ok=True)
    hf.write_processor(folder / PROCESSOR, model.config, processor)
    values = {path: variable.get_value() for path, variable in vlm.variables(model).items()}
    step = folder.absolute() / CHECKPOINTS / "0"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "params", values)
    path = step / FINGERPRINTS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fingerprints": fingerprints((values,))}) + "\n")
    if model.adapters is not None:
        model.adapters.write(folder)
    # last: a folder with this file is whole
    (folder / EXPERIMENT).write_text(json.dumps({"model": config_tree.to_dict(model.config)}, indent=2) + "\n")


def load(
    folder: Path,
    *,
    precision: Precision | None,
    sharding: hf.ShardingOf | None,
    step: int | Literal["best"] | None,
    grow_embedding: bool = False,
    quantize: QuantizationConfig | None = None,
) -> tuple[VLM, Processor]:
    """Return the model of a run at a step (None: the latest), and its processor; see `jvlm.weights.io.load`."""
    from jvlm.adapters import attach  # which reads weight tables
    from jvlm.weights import frozen  # which reads the folders that this one refers to, runs among them

    source = params_folder(folder, step)
    config = model_config(folder, precision)
    if not (folder / PROCESSOR).is_dir():
        raise WeightError(f"{folder / PROCESSOR} is missing: it holds the run's tokenizer; copy the whole run again")
    processor = hf.load_processor(folder / PROCESSOR, config, grow_embedding=grow_embedding)
    model, own = vlm.abstract(config), quantization(folder)
    if own is not None:
        model = quantized_template(model, own)
    saved_plan = adapter_plan.read(folder)
    if saved_plan is not None:
        model = attach.structure(model, saved_plan)
    values = frozen.read_all(folder, source, config, wanted_arrays(model, sharding))
    model = vocabulary.grow(vlm.bind(model, values), processor.model)
    if quantize is not None and own is None:
        model = quantized(model, quantize, sharding)
    elif quantize not in (None, own):
        raise UserError(f"{folder} was trained on a base quantised as {own}, and {quantize} is asked for; leave it out")
    return model, processor


def quantization(folder: Path) -> QuantizationConfig | None:
    """Return how the base of a run is quantised; None where it is not."""
    values = json_files.read_object(folder / EXPERIMENT).get("quantize")
    return None if values is None else config_tree.from_dict(QuantizationConfig, values, "quantize.")


class Arrays:
    """The parameters of a checkpoint in host memory, each when it is asked for, and checked once all of it was read.

    Args:
      params: where Orbax wrote them, on disk or in an object store.
      shapes: by dotted path.
      fingerprints: by dotted path, as `saved_fingerprints` gives them; None checks nothing.

    Raises:
      WeightError: missing, extra or wrongly shaped parameters, all of them listed; or files that cannot be read.
    """

    def __init__(
        self, params: epath.Path, shapes: Mapping[str, tuple[int, ...]], fingerprints: Mapping[str, int] | None = None
    ):
        self.params, self._fingerprints = params, fingerprints
        self._version = version_of((fingerprints or {}).values())
        metadata = json_files.read_object(params / "_METADATA")
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        stored = table.read_values(params / "_METADATA", _stored_paths, metadata)
        lines = [f"missing: {path} {shapes[path]}" for path in shapes if path not in stored]
        lines += [f"unexpected: {path}" for path in sorted(stored - set(shapes))]
        base = params.as_uri() if stores.is_remote(params) else params.absolute().as_uri()
        self._arrays: dict[str, Any] = {}
        for path in (path for path in shapes if path in stored):
            kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": path + "/"}
            spec = {"driver": driver, "kvstore": kvstore}
            with readable(params.parent, path):
                self._arrays[path] = ts.open(spec, open=True, read=True).result()
            if self._arrays[path].shape != shapes[path]:
                lines.append(f"wrong shape: {path} is {self._arrays[path].shape}, expected {shapes[path]}")
        if lines:
            raise WeightError(
                f"{params} does not match its configuration ({len(lines)} problems):\n  " + "\n  ".join(lines)
            )
        self._path, self._rows, self._block = "", range(0), None
        self._running: dict[str, tuple[int, Running]] = {}

    def dtype(self, path: str) -> np.dtype:
        """As it is stored."""
        return self._arrays[path].dtype.numpy_dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """Return a parameter, or one layer of a stacked one; layers asked for in order are read once.

        Raises:
          WeightError: files that cannot be read, or that are not what was saved.
        """
        array = self._arrays[path]
        if layer is None:
            return self._checked(path, slice(0, None), array.shape[0] if array.ndim else 1)
        if path != self._path or layer not in self._rows:
            # A chunk is decoded whole, so all its layers are read at once and kept until their turn.
            per_chunk = array.chunk_layout.read_chunk.shape[0]
            first = layer - layer % per_chunk
            self._path, self._rows = path, range(first, min(first + per_chunk, array.shape[0]))
            self._block = None
            self._block = self._checked(path, slice(self._rows.start, self._rows.stop), array.shape[0])
        return self._block[layer - self._rows.start]

    def read_slice(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a part of a parameter, unchecked."""
        with readable(self.params.parent, path):
            return self._arrays[path][index].read().result()

    def _checked(self, path: str, rows: slice, count: int) -> np.ndarray:
        """Rows of a parameter of so many; its fingerprint grows with rows that come in order, and must be right at the
        last."""
        with readable(self.params.parent, path):
            array = self._arrays[path]
            value = (array[rows] if array.ndim else array).read().result()
        if self._fingerprints is None:
            return value
        done, running = self._running.pop(path, (0, None))
        if running is None or rows.start == 0:
            done, running = 0, Running(self._version)
        if rows.start != done:  # out of order: begun again at the first
            return value
        running.add(value)
        done = count if rows.stop is None else rows.stop
        if done < count:
            self._running[path] = (done, running)
        elif running.value != self._fingerprints.get(path):
            raise damaged(self.params.parent, [path])
        return value

    def close(self) -> None:
        self._arrays, self._block, self._path, self._running = {}, None, "", {}


def stored_paths(params: epath.Path) -> set[str]:
    """Return the dotted paths of the parameters that Orbax wrote to a folder. Raises WeightError if it is damaged."""
    path = params / "_METADATA"
    return table.read_values(path, _stored_paths, json_files.read_object(path))


def _stored_paths(metadata: dict[str, Any]) -> set[str]:
    return {".".join(k["key"] for k in v["key_metadata"]) for v in metadata["tree_metadata"].values()}


def saved_fingerprints(step: epath.Path) -> dict[str, int] | None:
    """Return the fingerprint of each parameter when the checkpoint was saved, by dotted path.

    None, with a note, where Orbax alone wrote parameters: then a changed bit cannot be noticed.

    Raises:
      UserError: the file with them is missing or damaged, naming it.
    """
    path = step / FINGERPRINTS
    if not path.parent.exists():
        print(f"{step} has no fingerprints: its arrays are read unchecked", file=sys.stderr)
        return None
    return table.read_values(path, _of_parameters, json_files.read_object(path))


def _of_parameters(values: dict[str, Any]) -> dict[str, int]:
    saved = {_PARAMETER.fullmatch(key): int(number) for key, number in values["fingerprints"].items()}
    return {match[1]: number for match, number in saved.items() if match}


def damaged(step: epath.Path, paths: Iterable[str]) -> WeightError:
    """Return the error of arrays that are not what was saved."""
    paths = sorted(paths)
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return WeightError(
        f"checkpoint {step} is damaged: {len(paths)} arrays are not what was saved: {', '.join(paths[:5])}{more}. Copy "
        "it again, or take another step"
    )


@contextlib.contextmanager
def readable(step: epath.Path, array: str = "") -> Iterator[None]:
    """Turn what Orbax and tensorstore raise for files that are cut, changed or missing into one error.

    Raises:
      WeightError: naming the checkpoint and the array. A fault of network or permission is raised as it is.
    """
    reason = ""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lies_elsewhere(error):
            raise
        reason = cause(error)
    if reason:  # not within the handler: the error holds Orbax's other reads, which it has left unfinished
        of = f" of array {array}" if array else ""
        raise WeightError(
            f"checkpoint {step} is damaged: files{of} cannot be read ({reason}). Copy it again, or take another step"
        )


def lies_elsewhere(error: BaseException) -> bool:
    """Whether reading failed for a reason that lies not in the files: trying an older step would only hide it."""
    return any(word in f"{error} {cause(error)}" for word in _ELSEWHERE)


def cause(error: BaseException) -> str:
    """Return what tensorstore says beneath Orbax, which says where it happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_params(
    source: epath.Path, model: VLM, sharding: hf.ShardingOf | None = None, *, check: bool = True
) -> dict[str, jax.Array]:
    """Return dotted path -> array, of all parameters of a model; on the first device if no ``sharding`` is given.

    Arguments and errors are those of `read_arrays`.
    """
    return read_arrays(source, wanted_arrays(model, sharding), check=check)


def wanted_arrays(model: VLM, sharding: hf.ShardingOf | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of each parameter of a model, by path."""
    wanted = {}
    for path, variable in vlm.variables(model).items():
        own = sharding(path, variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted[path] = jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype, sharding=own)
    return wanted


def read_arrays(
    source: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], *, check: bool = True
) -> dict[str, jax.Array]:
    """Return dotted path -> array, of parameters that Orbax wrote.

    Arrays are compared with their saved fingerprints where they lie, so that nothing is read twice. Where the model
    wants another dtype than the stored one, they are read, compared and cast one after another.

    Args:
      check: whether there are fingerprints beside the parameters.

    Raises:
      WeightError: parameters that are missing, superfluous, of another shape, unreadable or not what was saved.
    """
    saved = saved_fingerprints(source.parent) if check else None
    arrays = Arrays(source, {path: want.shape for path, want in wanted.items()})
    # with parts on other hosts, all must hear of a failure before they compare
    agreed = (
        (lambda work: work()) if all(w.sharding.is_fully_addressable for w in wanted.values()) else hosts.run_on_all
    )

    def compare(restored: dict[str, jax.Array]) -> None:
        now = {} if saved is None else fingerprints(restored, version=version_of(saved.values()))
        changed = [path for path in restored if saved is not None and now[f"[{path!r}]"] != saved.get(path)]
        if changed:
            raise damaged(source.parent, changed)

    if all(arrays.dtype(path) == want.dtype for path, want in wanted.items()):
        restored = agreed(lambda: _restore(source, dict(wanted)))
        compare(restored)
        return restored
    restored = {}
    for path, want in wanted.items():
        value = agreed(lambda path=path, want=want: _read_as_stored(arrays, path, want))
        compare({path: value})
        restored[path] = value.astype(want.dtype).block_until_ready()
    return restored


def _restore(source: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    with (
        readable(source.parent),
        ocp.StandardCheckpointer(multiprocessing_options=by_itself()) as checkpointer,
    ):
        return checkpointer.restore(source, wanted)


def _read_as_stored(arrays: Arrays, path: str, want: jax.ShapeDtypeStruct) -> jax.Array:
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = arrays.read_slice(path, index)
        return parts[str(index)]

    return jax.make_array_from_callback(want.shape, want.sharding, part)


def by_itself() -> ocp.options.MultiprocessingOptions:
    """For reading: each process reads its parts, and waits for nobody, who may have failed."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
