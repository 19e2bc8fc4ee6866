"""Run by test_hosts.py in several processes at once, each of which says as JSON what it saw.

python -m tests.parallel.one_of_many JOB ADDRESS PROCESSES PROCESS [ARGUMENT ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jvlm.data import pipeline
from jvlm.data.position import Share
from jvlm.parallel import hosts
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import loop, program
from jvlm.training import step as stepping
from tests.parallel import models
from tests.training import support


def train(folder: str, rows: str, *overrides: str) -> None:
    """The demo, small, as every process of a run runs it."""
    loop.train(support.experiment(Path(folder), Path(rows), "--data.rows", "4", *overrides))


def step(data: str, context: str, folder: str, rows: str) -> None:
    """A step on a batch whose first rows, so the first hosts, have no pictures; and an epoch of data, shared."""
    parallel = ParallelConfig(data=int(data), context=int(context))
    experiment = models.experiment("qwen2_5_vl", parallel)
    planned = program.plan(experiment)
    part = hosts.part_of(planned.batches.tokens)
    state, frozen = planned.begin(loop.split(loop.random_model(experiment.model, 0, planned.layout.parameter))[1])
    whole = models.batch(experiment.model, text_only=models.ROWS // 2)
    own = jax.tree.map(lambda x: x[np.asarray(part.rows)], whole)
    placed = hosts.place(stepping.stack([own]), part.rows, planned.batches)
    _, metrics = planned.step(state, frozen, placed)

    read = support.experiment(Path(folder), Path(rows))
    processor = loop.start_model(
        read, lambda path, variable: jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    )[1]
    share = Share(part.index, part.count)
    batches = pipeline.training_data(processor, read.data, seed=3, epochs=1, share=share)[0]
    seen = [origin.row for packed in batches for row in packed.origins for origin in row]
    said = {"rows": part.rows, "index": part.index, "counts": part.counts, "patches": int(own.patch_segment_ids.any())}
    print(json.dumps({**said, "loss": float(metrics["loss"]), "norm": float(metrics["grad_norm"]), "seen": seen}))


if __name__ == "__main__":
    job, address, processes, process, *rest = sys.argv[1:]
    if int(processes) > 1:
        hosts.initialise(address, int(processes), int(process), timeout=120)
    globals()[job](*rest)
