"""Ids of the Hub in an experiment: each at one commit for the whole run, fetched once on each host."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax

from jvlm.data.config import DataConfig
from jvlm.hub import datasets, downloads
from jvlm.hub.ids import is_dataset_id, is_hub_id, parse_dataset, parse_id
from jvlm.parallel import hosts
from jvlm.training.config import Experiment
from jvlm.training.run_storage import RunStorage
from jvlm.training.side_files import read_json, write_json

HUB = "hub.json"
_MODELS = ("init_from", "encoder_from", "decoder_from", "tokenizer", "adapters_from")


def pin(experiment: Experiment, names: Iterable[str] = ()) -> tuple[Experiment, dict[str, str]]:
    """Return the experiment with its ids at their commits, all fetched, and id as it was given -> id at its commit.

    A run that was begun keeps the commits that it began with. Every process must call this: one on each host fetches.

    Args:
      names: of earlier runs of the experiment (its stages), whose commits count too.

    Raises: as `jvlm.hub.download`.
    """
    models = {model for model in _models(experiment) if is_hub_id(model)}
    data = {pattern for pattern in _patterns(experiment) if is_dataset_id(pattern)}
    if not models and not data:
        return experiment, {}

    def chosen() -> dict[str, str]:
        if not hosts.is_rank0():
            return {}
        begun = _begun(experiment, names)
        pins = {model: begun.get(model) or _at_commit(model) for model in models}
        return pins | {pattern: begun.get(pattern) or datasets.address(parse_dataset(pattern)) for pattern in data}

    pins = hosts.broadcast_from_0(hosts.run_on_all(chosen))
    neighbours = hosts.all_gather_object(socket.gethostname())
    first = neighbours.index(socket.gethostname()) == jax.process_index()
    # the others find in the cache what the first one of their host has fetched
    for is_turn in (first, not first):
        hosts.run_on_all(lambda is_turn=is_turn: _fetch(pins, data) if is_turn else None)
    for given, pinned in sorted(pins.items()):
        hosts.log_rank0(f"{given} is {pinned}")
    return _replaced(experiment, lambda model: pins.get(model, model)), pins


def write(folder: Path, pins: Mapping[str, str]) -> None:
    """Note in a run which commits it was trained with."""
    if pins and hosts.is_rank0():
        write_json(folder / HUB, dict(pins))


def _fetch(pins: dict[str, str], data: set[str]) -> None:
    for given, pinned in pins.items():
        if given in data:
            datasets.fetch(pinned)
        else:
            downloads.download(pinned)


def _begun(experiment: Experiment, names: Iterable[str]) -> dict[str, str]:
    """Return the commits of the run and of its earlier parts, as they noted them."""
    pins: dict[str, str] = {}
    for name in (*names, experiment.name):
        storage = RunStorage(experiment.output_root, name)
        storage.pull()
        pins |= read_json(storage.folder / HUB, "remove it, and the run takes the commits of today") or {}
    return pins


def _at_commit(model: str) -> str:
    return downloads.resolve(parse_id(model)).address


def _models(experiment: Experiment) -> list[str]:
    models = (getattr(experiment, name, None) for name in _MODELS)
    return [model for model in models if model is not None]


def _patterns(experiment: Experiment) -> list[str]:
    parts = [experiment.data, *(stage.data for stage in experiment.stages)]
    patterns = [pattern for part in parts for pattern in part.files]
    return [*patterns, *experiment.validation.data, *experiment.evaluation.data]


def _replaced(experiment: Experiment, of: Callable[[str], str]) -> Experiment:
    def in_data(config: DataConfig) -> DataConfig:
        mixture = config.mixture and config.mixture.map_files(of)
        return dataclasses.replace(config, train=tuple(map(of, config.train)), mixture=mixture)

    models = {name: of(getattr(experiment, name)) for name in _MODELS if getattr(experiment, name, None) is not None}
    stages = tuple(dataclasses.replace(stage, data=in_data(stage.data)) for stage in experiment.stages)
    validation = dataclasses.replace(experiment.validation, data=tuple(map(of, experiment.validation.data)))
    evaluation = dataclasses.replace(experiment.evaluation, data=tuple(map(of, experiment.evaluation.data)))
    parts = {"data": in_data(experiment.data), "stages": stages, "validation": validation, "evaluation": evaluation}
    return dataclasses.replace(experiment, **models, **parts)
