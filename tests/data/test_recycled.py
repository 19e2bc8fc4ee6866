"""Memory that is used again, and only when nothing refers to it."""

import contextlib
import gc
import multiprocessing
from pathlib import Path

import jax
import numpy as np
import pytest

from jvlm.data import pipeline
from jvlm.data.config import DataConfig
from jvlm.data.recycled import opened, recycled, scratch, shared_location
from tools import drawn_data


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    shape = (3, 1000)
    first = recycled(shape)
    first[:] = 7
    view = first[1:, 10:20]
    del first
    gc.collect()
    other = recycled(shape)
    other[:] = 1
    assert (view == 7).all()
    address = view.__array_interface__["data"][0] - 1010
    del view
    gc.collect()
    again = recycled(shape)
    assert again.__array_interface__["data"][0] == address
    assert (other == 1).all()


def test_an_array_of_jax_keeps_its_values():
    for value in range(20):
        array = recycled((64, 4096))
        array[:] = value
        on_device = jax.device_put(array)
        del array
        for _ in range(3):
            recycled((64, 4096))[:] = 99
        assert (np.asarray(on_device) == value).all()


def test_scratch_is_of_one_name():
    a, b = scratch("a", (2, 3)), scratch("b", (2, 3))
    a[:], b[:] = 1, 2
    assert (a == 1).all()
    assert scratch("a", (3,)).base is a.base


def _fill(place, value):
    opened(place)[:] = value


def test_another_process_writes_to_a_part_of_a_shared_array():
    array = recycled((4, 1000), is_shared=True)
    array[:] = 1
    assert shared_location(recycled((4, 1000))) is None
    process = multiprocessing.get_context("spawn").Process(target=_fill, args=(shared_location(array[2, 100:200]), 9))
    process.start()
    process.join(60)
    expected = np.ones((4, 1000), np.uint8)
    expected[2, 100:200] = 9
    assert np.array_equal(array, expected)


def shared_blocks():
    """Return how many open files are blocks of shared memory; one that was closed meanwhile is none."""
    count = 0
    for path in Path("/proc/self/fd").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):
            count += "jvlm-batch" in str(path.readlink())
    return count


@pytest.mark.slow
def test_processes_share_one_array_for_each_batch_however_many_there_are(tmp_path, tiny):
    """Each shared block costs the system calls of its own: one for all patches of a batch, used again."""
    path = drawn_data.write(tmp_path, "tiny", drawn_data.tiny, 300)
    config = DataConfig(
        train=(path,), batch_size=2, seq_len=256, max_patches=1024, worker_processes=1, prefetch=2, curves="off"
    )
    dataset, _ = pipeline.training_data(tiny.processor, config, seed=0)
    iterator, found = iter(dataset), []
    for _ in range(30):
        next(iterator)
        found.append(shared_blocks())
    iterator.close()
    assert max(found[10:]) <= max(found[:10])
    assert 1 <= max(found) <= 8
