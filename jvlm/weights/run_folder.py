"""A jvlm run folder as a source of models.

experiment.json          the resolved experiment, model and processor included
processor/               tokenizer and settings
checkpoints/STEP/params  Orbax, dotted parameter path -> array
checkpoints.at           in the local copy of a run in an object store: where its checkpoints are
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from jvlm import config as config_tree
from jvlm.data import stores
from jvlm.data.processor import Processor
from jvlm.models import vlm
from jvlm.models.layers import Numerics
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.weights import checkpoint
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
    values = json.loads((folder / EXPERIMENT).read_text())
    config = config_tree.from_dict(VLMConfig, values["model"], "model.")
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
    folder: Path, *, numerics: Numerics | None, sharding: checkpoint.ShardingOf | None, step: int | None
) -> tuple[VLM, Processor]:
    """The model of a run at a step (None: the latest), and its processor; see `jvlm.weights.checkpoint.load`."""
    source = params_folder(folder, step)
    config = model_config(folder, numerics)
    model = vlm.abstract(config)
    values = read_params(source, model, sharding)
    return vlm.bind(model, values), checkpoint.load_processor(folder / PROCESSOR, config)


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
