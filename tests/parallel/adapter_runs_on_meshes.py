"""Run by test_adapters.py in a process with 8 CPU devices: runs of adapters that change their mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

import jvlm
from jvlm.models import vlm
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import runs
from jvlm.training.interruption import Interrupted
from jvlm.training.starting_model import start_model
from tests.adapters.test_training import OPTIONS, StopAfter, experiment, values_of
from tests.training import support

FIRST = ParallelConfig(data=2, fsdp=2, tensor=2)
OTHERS = {"fsdp context": ParallelConfig(data=1, fsdp=4, context=2), "data": ParallelConfig(data=8)}


def share(model: vlm.VLM) -> float:
    """The part of an adapter's bytes that is on one device."""
    values = [v.get_value() for path, v in vlm.variables(model).items() if ".adapter." in path]
    return sum(v.addressable_shards[0].data.nbytes for v in values) / sum(v.nbytes for v in values)


def main(folder: str) -> None:
    """Print a JSON line for each mesh that is not the first."""
    folder = Path(folder)
    examples = support.write_examples(folder / "data", 48)
    jvlm.save(*start_model(support.experiment(folder, examples, *OPTIONS)), folder / "base")

    def of(name: str, parallel: ParallelConfig, **changes):
        found = experiment(folder / name, folder / "base", examples, parallel=parallel, **changes)
        optimizer = dataclasses.replace(found.optimizer, kind="adamw")
        return dataclasses.replace(
            found, data=dataclasses.replace(found.data, batch_size=8, pack_window=24), optimizer=optimizer
        )

    whole = runs.train(of("whole", FIRST))
    expected, losses = values_of(whole.model), support.losses(folder / "whole")
    with contextlib.suppress(Interrupted):
        runs.train(of("stopped", FIRST, hooks=(StopAfter(2),)))
    for name, parallel in OTHERS.items():
        place = MeshLayout.of(parallel).parameter
        loaded, _ = jvlm.load(folder / "whole/run", sharding=place)
        jvlm.save(loaded, whole.processor, folder / name / "peft", format="peft", base=str(folder / "base"))
        from_peft, _ = jvlm.load(folder / name / "peft", sharding=place)
        goes_on = of(name, parallel, adapter=None, adapters_from=str(folder / "whole/run"))
        models = {"run": loaded, "peft": from_peft, "adapters_from": start_model(goes_on, place)[0]}
        shutil.copytree(folder / "stopped", folder / name, dirs_exist_ok=True)
        runs.train(of(name, parallel))
        found = support.losses(folder / name)
        line = {
            "mesh": name,
            "equal": {key: _equal(values_of(model), expected) for key, model in models.items()},
            "share": {key: share(model) for key, model in models.items()},
            "losses": [abs(found[step] - loss) for step, loss in losses.items()],
        }
        print(json.dumps(line), flush=True)


def _equal(values: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return values.keys() == expected.keys() and all(np.array_equal(values[p], v) for p, v in expected.items())
