"""Whether a run folder holds this same run: its settings, its data and the model it began from."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jvlm
from jvlm import config as config_tree
from jvlm.data import stores
from jvlm.data.config import DataConfig
from jvlm.data.example_source import ExampleSource
from jvlm.data.mixture.examples import Examples
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.hub.ids import portable
from jvlm.models.vlm import TOWERS
from jvlm.parallel import hosts
from jvlm.training.config import Experiment
from jvlm.training.optimizer.config import OptimizerConfig
from jvlm.training.side_files import read_json, write_json
from jvlm.weights import frozen, hf, run_dir
from jvlm.weights.run_dir import EXPERIMENT, PROCESSOR

INPUTS, CHANGES = "inputs.json", "changes.jsonl"
# A restart may change these; anything else would make the rest of the run another experiment.
_FREE = (
    *(
        "checkpoint",
        "evaluation",
        "export",
        "push",
        "log_interval_steps",
        "stop_after_skips",
        "profile",
        "output_root",
        *(f"validation.{name}" for name in ("interval_steps", "patience", "min_delta", "use_best")),
        "hooks",
    ),
    *("data.read_threads", "data.prefetch", "data.lengths_folder"),
    *("data.max_bad_fraction", "data.max_too_long_fraction"),
    *("parallel", "topologies", "accept_changes"),
)
# Settings of the data that a run derives where they have these values.
_DERIVED = {
    "seq_len": "auto",
    "max_patches": "auto",
    "max_image_patches": None,
    "sources": (),
    "measured": (),
    "run_examples": None,
}
# These change what the optimizer's state is of: no checkpoint can be read with others.
_SHAPES = (
    "model.",
    "adapt.",
    *(f"optimizer.{name}" for name in ("kind", "train", "freeze", "lr_pattern", "ema_decay", "use_ema")),
)
# Files up to so many bytes are read whole for their fingerprint, and up to so many of all data files together; of
# others so many pieces of so many bytes.
_WHOLE, _ALL = 64 * 2**20, 2**30
_PIECES, _PIECE = 64, 64 * 2**10
_MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")


@dataclasses.dataclass(frozen=True)
class SavedSettings:
    """The settings in a run's `experiment.json` that a restart reads as such; the others are compared as they stand."""

    data: DataConfig
    optimizer: OptimizerConfig
    steps: int | None

    @classmethod
    def read(cls, values: dict[str, Any], folder: Path) -> SavedSettings:
        """Return the settings in the values of a file. Raises UserError for a file that is not of a training run."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not set(names) <= set(values):
            raise UserError(f"{folder} holds a saved model and not a training run; choose another --name, or remove it")
        try:
            return config_tree.from_dict(cls, {name: values[name] for name in names})
        except UserError as error:
            raise UserError(
                f"{folder / EXPERIMENT}: {error}; it was changed, or another version of jvlm wrote it: restore it, or "
                "choose another --name"
            ) from error


def derived(experiment: Experiment, folder: Path) -> Experiment:
    """Return the experiment with what it derives from the data as the run in the folder had derived it."""
    saved = read_json(folder / EXPERIMENT, "the run cannot go on without it: restore it, or choose another --name")
    if saved is None:
        return experiment
    settings, data = SavedSettings.read(saved, folder), experiment.data
    values = {name: getattr(settings.data, name) for name, left in _DERIVED.items() if getattr(data, name) == left}
    data = dataclasses.replace(data, **values)
    return dataclasses.replace(experiment, data=data, steps=experiment.steps or settings.steps)


def prepare_folder(folder: Path, experiment: Experiment, processor: Processor) -> list[str]:
    """Create the run folder, or check that it holds this same run. Returns the changes that were accepted.

    Raises:
      UserError: another experiment, other data or another model to start from; names each change with both values.
    """
    resolved = plain_values(experiment)

    def compare() -> tuple[dict[str, Any], list[str]]:
        present = inputs(experiment)  # on all: none waits for another that reads
        return present, _changes(folder, experiment, resolved, present) if hosts.is_rank0() else []

    present, changed = hosts.broadcast_from_0(hosts.run_on_all(compare))
    if hosts.is_rank0():
        (folder / PROCESSOR).mkdir(parents=True, exist_ok=True)
        hf.write_processor(folder / PROCESSOR, experiment.model, processor)
        write_json(folder / INPUTS, present)
        write_json(folder / EXPERIMENT, resolved)
        if changed:
            with open(folder / CHANGES, "a") as file:
                file.write(_line(changed))
    hosts.barrier("wrote the run folder")
    for line in changed:
        hosts.log_rank0(f"changed since the run began, and accepted: {line}")
    return changed


def plain_values(experiment: Experiment) -> dict[str, Any]:
    """Return an experiment as values for JSON. Task and hooks are named with their fields and a hash of their code."""
    values = config_tree.to_dict(dataclasses.replace(experiment, hooks=()))
    return {**values, "task": _described(experiment.task), "hooks": [_described(hook) for hook in experiment.hooks]}


def _described(part: Any) -> dict[str, Any]:
    kind = type(part)
    values = config_tree.to_dict(part) if dataclasses.is_dataclass(part) else {}
    described = {"type": f"{kind.__module__}.{kind.__qualname__}", **values}
    if not kind.__module__.startswith("jvlm."):
        functions = [f for _, f in sorted(vars(kind).items()) if inspect.isfunction(f) and _is_written(f)]
        described["code"] = hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()
    return described


def _is_written(function: Any) -> bool:
    """Whether somebody wrote it; dataclasses make some of their methods."""
    return not inspect.unwrap(function).__code__.co_filename.startswith("<")


def _line(changed: Sequence[str]) -> str:
    return json.dumps({"time": time.time(), "jvlm": jvlm.__version__, "changes": list(changed)}) + "\n"


def _changes(folder: Path, experiment: Experiment, resolved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    saved = read_json(folder / EXPERIMENT, "the run cannot go on without it: restore it, or choose another --name")
    if saved is None:
        return []
    optimizer = SavedSettings.read(saved, folder).optimizer
    settings = [line for line in config_tree.differences(saved, resolved) if not line.startswith(_FREE)]
    before = read_json(folder / INPUTS, "remove it, and the run takes its present data and start for those it had")
    others = [] if before is None else list(config_tree.differences(before, present))
    if not settings and not others:
        return []
    shapes = [line for line in settings if line.startswith(_SHAPES)]
    rates = [(tower, optimizer.rate_of(tower), experiment.optimizer.rate_of(tower)) for tower in TOWERS]
    shapes += [f"{tower}: frozen or not" for tower, before_rate, rate in rates if (before_rate > 0) != (rate > 0)]
    if experiment.accept_changes and not shapes:
        return [*settings, *others]
    way = "another experiment" if settings else "the same experiment on other data or another start"
    fix = "" if shapes else ", or go on with --accept_changes true, which notes them in changes.jsonl"
    raise UserError(
        f"{folder} holds {way}; remove it or choose another --name{fix}. Differences:\n  "
        + "\n  ".join([*settings, *others])
    )


def inputs(experiment: Experiment) -> dict[str, Any]:
    """Fingerprints of what a run begins from: its data files, and the folders of models and tokenizers."""
    examples = Examples.open(experiment.data)
    parts = {name: _of_source(part) for name, part in zip(examples.names, examples.parts, strict=True)}
    result = {"data": parts if examples.is_mixture else parts[examples.names[0]]}
    if experiment.validation.data:
        result["validation"] = _of_source(ExampleSource(experiment.validation.data))
    names = ("init_from", "encoder_from", "decoder_from", "tokenizer")
    starts = {name: getattr(experiment, name) for name in names if getattr(experiment, name) is not None}
    return {**result, "start": {name: _of_model(path) for name, path in starts.items()}}


def _of_source(source: ExampleSource) -> dict[str, Any]:
    counts = source.counts()
    budget = min(_WHOLE, _ALL // len(source.files))
    return {portable(path): {**_fingerprint([Path(path)], budget), "examples": counts[path]} for path in source.files}


def _of_model(source: str) -> dict[str, Any]:
    folder = run_dir.local(source)
    if not run_dir.is_run(folder):
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
        return _fingerprint((p for p in files if p.is_file() and p.suffix in _MODEL_FILES), _WHOLE)
    step = run_dir.steps(folder)[-1]
    checkpoint_dir = run_dir.checkpoints(folder) / str(step)
    record = frozen.read(folder)
    result = {"step": step, "model": _digest_of(run_dir.model_config(folder)), "frozen": record and record.digest}
    if not stores.is_remote(checkpoint_dir):
        # beside the data position of a training run lie fingerprints of its arrays
        part = Path(checkpoint_dir) / ("data" if (checkpoint_dir / "data").is_dir() else "params")
        files = sorted(p for p in part.rglob("*") if p.is_file())
        result |= _fingerprint(files, _ALL // max(len(files), 1))
    return result


def _digest_of(config: Any) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()


def _fingerprint(files: Iterable[Path], budget: int) -> dict[str, Any]:
    """Return the number of bytes, and a hash of names and contents; above ``budget`` bytes, of pieces of the files."""
    digest, size = hashlib.sha256(), 0
    for path in files:
        length = path.stat().st_size
        size += length
        digest.update(f"{path.name} {length}\n".encode())
        for piece in _pieces(path, length, budget):
            digest.update(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(path: Path, length: int, budget: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if length <= max(budget, 2 * _PIECE):
            while block := file.read(2**20):
                yield block
            return
        count = min(max(budget // _PIECE, 2), _PIECES)
        for number in range(count):
            file.seek(number * (length - _PIECE) // (count - 1))
            yield file.read(_PIECE)
