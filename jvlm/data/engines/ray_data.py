"""The same work done by Ray Data: on the processors of this machine, or on all machines of a Ray cluster.

A part is a block of its own, which Ray Data gives to an actor that has the task open, and gives to another one if the
machine is lost. Values come back to this process, which alone writes what is measured; shards are written where they
are made. So the data, the output folder and what a task reads must have the same names on all machines.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle
import msgpack

from jvlm.data.engines.engine import Task
from jvlm.errors import UserError
from jvlm.validation import check_fields

_BLOCKS = 4096  # most that Ray is asked to plan for


@dataclasses.dataclass(frozen=True)
class RayData:
    """Does tasks with Ray Data.

    Attributes:
      workers: processes that work; None is as many as the cluster has processors for.
      cpus, gpus: that each of them takes.
      address: of a cluster, as `ray.init` takes it; None is that of RAY_ADDRESS, or else Ray on this machine alone.

    Raises:
      UserError: ray is not installed, or a number that makes no sense.
    """

    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None

    def __post_init__(self):
        check_fields(self, "engine.", {"cpus": "(0, inf)", "gpus": "[0, inf)"})
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}; it must be at least 1")
        _ray()

    def run(self, task: Task, parts: Sequence[range]) -> Iterator[tuple[int, list[Any]]]:
        """See `jvlm.data.engines.engine.Engine`."""
        if not parts:
            return
        ray = _ray()
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent about the run
            ray.init(self.address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        data = importlib.import_module("ray.data")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False  # our own counts examples
        items = [{"part": index, "start": some.start, "stop": some.stop} for index, some in enumerate(parts)]
        blocks = data.from_items(items, override_num_blocks=min(len(items), _BLOCKS))
        most = self.workers or max(1, int(ray.cluster_resources().get("CPU", 1) // self.cpus))
        done = blocks.map(
            _Worker,
            fn_constructor_args=(cloudpickle.dumps(task), os.getcwd()),
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(most, len(items))),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])  # of our own process
            yield int(row["part"]), msgpack.unpackb(row["values"])


class _Worker:
    """A task, opened in an actor of Ray."""

    def __init__(self, task: bytes, folder: str):
        os.chdir(folder)  # where relative names of files are looked up
        self._task = cloudpickle.loads(task)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        values, error = b"", b""
        try:
            values = msgpack.packb(self._task(range(row["start"], row["stop"])))
        except UserError as raised:
            error = pickle.dumps(raised)
        return {"part": row["part"], "values": values, "error": error}


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--engine ray needs Ray Data: pip install 'jvlm[ray]'") from error
