"""Run by test_hosts.py in several processes at once, each of which says as JSON what it saw.

python -m tests.parallel.one_of_many JOB ADDRESS PROCESSES PROCESS [ARGUMENT ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jvlm import job
from jvlm.errors import UserError
from jvlm.parallel import data_shards, hosts
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import compiled_step, data_counters, starting_model, train_step, trainer
from jvlm.training.checkpoint import Checkpoints
from jvlm.training.config import CheckpointConfig
from jvlm.training.state import TrainState
from tests.parallel import models
from tests.training import support, test_checkpoint


def train(folder: str, examples: str, *overrides: str) -> None:
    """The demo, small, as every process of a run runs it; says which examples it learns from."""
    _say_what_is_read()
    job.run(support.experiment(Path(folder), Path(examples), "--data.batch_size", "4", *overrides))


def train_and_die(folder: str, examples: str, step: str, *overrides: str) -> None:
    """As `train`, but the last process is killed when it is to save this step, which all have run."""
    save = Checkpoints.save

    def kill(checkpoints: Checkpoints, now: int, *arguments, **options):
        if now == int(step) and jax.process_index() == jax.process_count() - 1:
            deadline = time.monotonic() + 60
            while now not in support.losses(Path(folder)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"process 0 has not logged step {now}, which all have run")
                time.sleep(0.05)  # between two looks at the log
            os.kill(os.getpid(), signal.SIGKILL)
        return save(checkpoints, now, *arguments, **options)

    Checkpoints.save = kill
    train(folder, examples, *overrides)


def _say_what_is_read() -> None:
    add = data_counters.DataCounters.add

    def said(seen, packed, step: int) -> None:
        if seen.counts:
            print(
                json.dumps({"step": step, "seen": [o.number for sequence in packed.origins for o in sequence]}),
                flush=True,
            )
        add(seen, packed, step)

    data_counters.DataCounters.add = said


def damaged(folder: str) -> None:
    """Writes four steps, the last two of which cannot be read by one process, and goes on from what is left."""
    mesh = jax.make_mesh((jax.process_count(),), ("fsdp",))
    parts, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

    def put(value: np.ndarray, place: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    def state_of(step: int):
        params = {"decoder.a": put(np.arange(2**15, dtype=np.float32) + step, parts)}
        opt_state = {"mu": put(np.arange(2**15) / np.float32(step + 1), parts)}
        return TrainState(put(np.int32(0), whole), params, opt_state)

    with Checkpoints(Path(folder), CheckpointConfig(save_interval_steps=1, max_to_keep=9)) as checkpoints:
        for number in range(1, 5):
            checkpoints.save(number, state_of(number), {"position": number})
    hosts.barrier("written")
    if jax.process_index() == 1:
        for number, damage in ((3, test_checkpoint.flip), (4, test_checkpoint.cut)):
            damage(Path(folder) / "checkpoints" / str(number) / "params" / "ocdbt.process_1")
    hosts.barrier("damaged")
    with Checkpoints(Path(folder), CheckpointConfig(save_interval_steps=1, max_to_keep=9)) as checkpoints:
        found, state, data = checkpoints.restore_latest(state_of(0))
        both = (jax.tree.leaves((s.trainable, s.opt_state)) for s in (state, state_of(found)))
        equal = all(np.array_equal(a.addressable_data(0), b.addressable_data(0)) for a, b in zip(*both, strict=True))
        again = checkpoints.save(found + 1, state_of(found + 1), {"position": found + 1})
    print(json.dumps({"step": found, "data": data, "equal": equal, "again": again}))
    with Checkpoints(Path(folder), CheckpointConfig(save_interval_steps=1, max_to_keep=9)) as checkpoints:
        if jax.process_index() == 1:
            checkpoints._read = _refused
        _say_how_it_fails(lambda: checkpoints.restore_latest(state_of(0)))
    _say_how_it_fails(lambda: hosts.run_on_all(_mistaken if jax.process_index() == 1 else str))
    if jax.process_index() == 1:
        hosts.abort(3, seconds=1)
    hosts.barrier("one that has left")


def _say_how_it_fails(work) -> None:
    """Print the type of the error, whether a peer says that it is the user's, and the message."""
    try:
        work()
    except (OSError, UserError) as error:
        print(json.dumps([type(error).__name__, None, str(error)]), flush=True)
    except hosts.PeerFailed as error:
        print(json.dumps(["PeerFailed", error.is_user_error, str(error)]), flush=True)


def _mistaken():
    raise UserError("no such thing")


def _refused(*_):
    raise OSError("PERMISSION_DENIED: no access")


def step(data: str, context: str, folder: str, examples: str, *overrides: str) -> None:
    """A step on a batch whose first sequences, so the first hosts, have no pictures; then goes on with a run."""
    parallel = ParallelConfig(data=int(data), context=int(context))
    experiment = models.experiment("qwen2_5_vl", parallel)
    planned = compiled_step.compile_step(experiment)
    shard = data_shards.data_shard_for(planned.batches.tokens)
    state = planned.init_state(
        trainer.split(starting_model.random_model(experiment.model, 0, planned.layout.parameter))[1]
    )
    whole = models.batch(experiment.model, text_only=models.SEQUENCES // 2)
    own = jax.tree.map(lambda x: x[np.asarray(shard.sequences)], whole)
    placed = data_shards.make_global_batch(train_step.stack([own]), shard, planned.batches)
    _, metrics = planned.step(state, placed)
    read = {"sequences": shard.sequences, "index": shard.index, "primary": shard.is_primary_reader}
    said = {**read, "patches": int(own.patch_segment_ids.any())}
    print(json.dumps({**said, "loss": float(metrics["loss"]), "norm": float(metrics["grad_norm"])}))
    train(folder, examples, *overrides)


def _speak_alone() -> None:
    """Only what Python prints goes to standard output: Gloo's threads write there too, one message into another."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


if __name__ == "__main__":
    _speak_alone()
    name, address, processes, process, *rest = sys.argv[1:]
    if int(processes) > 1:
        hosts.initialise(address, int(processes), int(process), timeout=120)
    globals()[name](*rest)
