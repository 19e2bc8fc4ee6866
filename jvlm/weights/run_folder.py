"""A jvlm run folder as a source of models.

experiment.json          the resolved experiment, model and processor included
processor/               tokenizer and settings
checkpoints/STEP/params  Orbax, dotted parameter path -> array
checkpoints.at           in the local copy of a run in an object store: where its checkpoints are
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jvlm import config as config_tree
from jvlm import json_files
from jvlm.data import stores
from jvlm.data.processor import Processor
from jvlm.models import vlm
from jvlm.models.layers import Numerics
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.weights import checkpoint, table, vocabulary
from jvlm.weights.table import WeightError

EXPERIMENT, CHECKPOINTS, PROCESSOR, POINTER = "experiment.json", "checkpoints", "processor", "checkpoints.at"


def local(place: str | Path) -> Path:
    """The folder of a run or of a Hugging Face model on disk: itself, or a local copy of a remote one.

    The arrays of a run stay in the store, and the copy says where.
    """
    folder = stores.model_folder(place, (PROCESSOR,))
    if stores.is_remote(place) and is_run(folder):
        (folder / POINTER).write_text(f"{stores.at(str(place)) / CHECKPOINTS}\n")
    return folder


def is_run(folder: Path) -> bool:
    """Whether a folder is a jvlm run."""
    return (folder / EXPERIMENT).is_file()


def model_config(folder: Path, numerics: Numerics | None = None) -> VLMConfig:
    """The model configuration of a run."""
    path = folder / EXPERIMENT
    values = json_files.read_object(path)
    config = table.read_values(path, lambda v: config_tree.from_dict(VLMConfig, v["model"], "model."), values)
    return dataclasses.replace(config, numerics=numerics or config.numerics)


def checkpoints(folder: Path) -> epath.Path:
    """Where the checkpoints of a run are, on disk or in an object store."""
    pointer = folder / POINTER
    return epath.Path(pointer.read_text().strip() if pointer.is_file() else folder.absolute() / CHECKPOINTS)


def steps(folder: Path) -> list[int]:
    """Steps whose checkpoints are complete, ascending."""
    found = [p.parent for p in checkpoints(folder).glob("*/params") if p.parent.name.isdigit()]
    # on disk a step is given its name when it is whole; in a store, a file more
    return sorted(int(p.name) for p in found if ocp.utils.is_checkpoint_finalized(p))


def params_folder(folder: Path, step: int | None = None) -> epath.Path:
    """Where the parameters of a step (None: the latest) are. Raises WeightError naming the steps there are."""
    available = steps(folder)
    if not available:
        raise WeightError(f"{folder} has no complete checkpoint yet")
    if step is not None and step not in available:
        raise WeightError(f"{folder} has no checkpoint of step {step}; it has {available}")
    return checkpoints(folder) / str(available[-1] if step is None else step) / "params"


def save(model: VLM, processor: Processor, folder: Path) -> None:
    """Write a model as a run folder of one checkpoint, at step 0. Raises WeightError if the folder holds a run."""
    if is_run(folder):
        raise WeightError(f"{folder} holds a run already; choose another folder")
    (folder / PROCESSOR).mkdir(parents=True, exist_ok=True)
    checkpoint.write_processor(folder / PROCESSOR, model.config, processor)
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / CHECKPOINTS / "0" / "params", values)
    # last: a folder with this file is whole
    (folder / EXPERIMENT).write_text(json.dumps({"model": config_tree.to_dict(model.config)}, indent=2) + "\n")


def load(
    folder: Path,
    *,
    numerics: Numerics | None,
    sharding: checkpoint.ShardingOf | None,
    step: int | None,
    grow_embedding: bool = False,
) -> tuple[VLM, Processor]:
    """The model of a run at a step (None: the latest), and its processor; see `jvlm.weights.loading.load`."""
    source = params_folder(folder, step)
    config = model_config(folder, numerics)
    processor = checkpoint.load_processor(folder / PROCESSOR, config, grow_embedding=grow_embedding)
    model = vlm.abstract(config)
    values = read_params(source, model, sharding)
    return vocabulary.grow(vlm.bind(model, values), processor.model), processor


class Arrays:
    """The parameters of a checkpoint in host memory, each when it is asked for.

    Args:
      params: where Orbax wrote them, on disk or in an object store.
      shapes: by dotted path.

    Raises:
      WeightError: missing, extra or wrongly shaped parameters, all of them listed.
    """

    def __init__(self, params: epath.Path, shapes: Mapping[str, tuple[int, ...]]):
        metadata = json.loads((params / "_METADATA").read_text())
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        stored = {".".join(k["key"] for k in v["key_metadata"]) for v in metadata["tree_metadata"].values()}
        lines = [f"missing: {path} {shapes[path]}" for path in shapes if path not in stored]
        lines += [f"unexpected: {path}" for path in sorted(stored - set(shapes))]
        base = params.as_uri() if stores.is_remote(params) else params.absolute().as_uri()
        self._arrays: dict[str, Any] = {}
        for path in (path for path in shapes if path in stored):
            kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": path + "/"}
            self._arrays[path] = ts.open({"driver": driver, "kvstore": kvstore}, open=True, read=True).result()
            if self._arrays[path].shape != shapes[path]:
                lines.append(f"wrong shape: {path} is {self._arrays[path].shape}, expected {shapes[path]}")
        if lines:
            raise WeightError(
                f"{params} does not match its configuration ({len(lines)} problems):\n  " + "\n  ".join(lines)
            )
        self._path, self._rows, self._block = "", range(0), None

    def dtype(self, path: str) -> np.dtype:
        """As it is stored."""
        return self._arrays[path].dtype.numpy_dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, or one layer of a stacked one; layers asked for in order are read once."""
        array = self._arrays[path]
        if layer is None:
            return array.read().result()
        if path != self._path or layer not in self._rows:
            # A chunk is decoded whole, so all its layers are read at once and kept until their turn.
            per_chunk = array.chunk_layout.read_chunk.shape[0]
            first = layer - layer % per_chunk
            self._path, self._rows = path, range(first, min(first + per_chunk, array.shape[0]))
            self._block = None
            self._block = array[self._rows.start : self._rows.stop].read().result()
        return self._block[layer - self._rows.start]

    def close(self) -> None:
        self._arrays, self._block, self._path = {}, None, ""


def read_params(source: epath.Path, model: VLM, sharding: checkpoint.ShardingOf | None = None) -> dict[str, jax.Array]:
    """Dotted path -> array, of parameters that Orbax wrote; on the first device if no ``sharding`` is given."""
    wanted = {}
    for path, variable in vlm.parameters(model).items():
        place = sharding(path, variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted[path] = jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype, sharding=place)
    with ocp.StandardCheckpointer(multiprocessing_options=by_itself()) as checkpointer:
        return checkpointer.restore(source, wanted)


def by_itself() -> ocp.options.MultiprocessingOptions:
    """For reading: each process reads its parts, and waits for nobody, who may have failed."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
