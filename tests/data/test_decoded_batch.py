"""Batches whose images are decoded ahead: one that is dropped is written to no more, whoever decodes it."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from jvlm.data.content import Image
from jvlm.data.decoded_batch import DecodingBatch
from jvlm.data.errors import Origin
from jvlm.data.unread_patches import UnreadImage, UnreadPatches
from jvlm.data.workers import Threads


class Slow:
    """A processor that writes the number of the image once it is let go; it has a fault at number 3."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def write_patches(self, unread, out):
        self.begun.set()
        assert self.go.wait(30)
        if unread.index == 3:
            raise RuntimeError("a fault of the program")
        out[:] = unread.index


@pytest.fixture
def slow():
    processor = Slow()
    workers = Threads(None, processor, 1)
    yield processor, workers
    processor.go.set()
    workers.close()


def begin(workers, *numbers):
    """Return (a batch of an example with images of these numbers and two patches each, its array)."""
    where = {"origin": Origin(), "field": "images[0]", "roots": (), "still": False}
    images = [UnreadImage(Image("x"), (4, 4), None, n, 1, **where, patches=2, start=0, stop=2) for n in numbers]
    patches = UnreadPatches(tuple(images), 5)
    example, array = SimpleNamespace(patches=patches, num_patches=len(patches)), np.zeros(patches.shape, np.uint8)

    def assemble(sequences, write):
        write(example, array)
        return "batch"

    return DecodingBatch([[example]], assemble, workers.patches), array


def test_a_finished_batch_has_all_of_its_images(slow):
    processor, workers = slow
    batch, array = begin(workers, 1, 2)
    processor.go.set()
    assert batch.finish()[0] == "batch"
    assert array[:, 0].tolist() == [1, 1, 2, 2]


def test_dropping_waits_for_what_is_being_written_and_leaves_the_rest_undone(slow):
    processor, workers = slow
    batch, array = begin(workers, 1, 2, 4)
    assert processor.begun.wait(30)
    dropping = threading.Thread(target=batch.drop)
    dropping.start()
    dropping.join(0.1)
    assert dropping.is_alive()
    processor.go.set()
    dropping.join(30)
    assert not dropping.is_alive()
    assert workers.patches(begin(workers, 1)[0]._begun[0][0].patches.pieces[0], np.zeros((2, 5))).result() is None
    assert array[:, 0].tolist() == [1, 1, 0, 0, 0, 0]


def test_a_fault_ends_the_batch(slow):
    processor, workers = slow
    batch, array = begin(workers, 3, 2)
    processor.go.set()
    with pytest.raises(RuntimeError, match="a fault of the program"):
        batch.finish()
    before = array.copy()
    assert workers.patches(begin(workers, 1)[0]._begun[0][0].patches.pieces[0], np.zeros((2, 5))).result() is None
    assert np.array_equal(array, before)
