"""The model of a checkpoint folder of ``jvlm sft``: a whole one, or an adapter on the base that it was trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jvlm.errors import UserError
from jvlm.hub.ids import of_cache, parse_id
from jvlm.swift import saved
from jvlm.swift.checkpoints import ARGUMENTS
from jvlm.weights import run_dir

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.models.vlm import VLM
    from jvlm.parallel.layout import MeshLayout

ADAPTER_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a model is.

    Attributes:
      base: folder, or id, of a whole model.
      adapter: folder of an adapter on it; None for the model as it is.
    """

    base: str
    adapter: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint: the adapter's where there is one."""
        return self.adapter or Path(self.base)

    @property
    def local_name(self) -> Path:
        """The folder, or, of a checkpoint from the Hub, its name in the working directory: what is made lies beside."""
        on_hub = of_cache(self.folder)
        if on_hub is None and self.adapter is None and not Path(self.base).exists():
            on_hub = parse_id(self.base)
        return self.folder if on_hub is None else Path(on_hub.repo.rpartition("/")[2])


def find(checkpoint: str | None, model: str | None) -> Checkpoint:
    """Return the model that --adapters and --model name.

    Raises:
      UserError: neither is given; a folder that holds no model; an adapter whose base is not known.
    """
    if checkpoint is None:
        if model is None:
            raise UserError("give --adapters CHECKPOINT, or --model DIR")
        return Checkpoint(model)
    folder = run_dir.local(checkpoint)
    if not folder.is_dir():
        raise UserError(f"--adapters {checkpoint} is not a folder")
    if (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(model or _base_of(folder), folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"--adapters {checkpoint} holds neither {ADAPTER_CONFIG} nor config.json of a whole model")
    if model is not None:
        raise UserError(f"--adapters {checkpoint} is a whole model: leave out --model {model}")
    return Checkpoint(str(folder))


def _base_of(folder: Path) -> str:
    if (folder / ARGUMENTS).is_file() or (folder.parent / ARGUMENTS).is_file():
        return saved.read(folder)["model"]
    base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name the base model; give it as --model")
    return base


def load(checkpoint: Checkpoint, dtype: str | None = None) -> tuple[VLM, Processor, MeshLayout | None]:
    """Return the model, with its adapter where it has one, its processor, and its layout over all devices.

    Args:
      dtype: of the parameters; None is float32 for a whole model and bfloat16 under an adapter.
    """
    from jvlm.inference import sharding
    from jvlm.weights import hf, io

    base = run_dir.local(checkpoint.base)
    config = io.read_config(base)
    wanted = dtype or ("float32" if checkpoint.adapter is None else "bfloat16")
    precision = dataclasses.replace(config.precision, param_dtype=wanted)
    layout = sharding.inference_layout(dataclasses.replace(config, precision=precision), None)
    place = layout.parameter if layout else None
    model, processor = io.load(base, precision=precision, sharding=place, adapter=checkpoint.adapter)
    if checkpoint.adapter is not None and (checkpoint.adapter / "tokenizer.json").is_file():
        processor = hf.load_processor(checkpoint.adapter, model.config)
    return model, processor, layout
