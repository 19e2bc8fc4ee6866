"""An iterator that nobody closes ends, whichever thread collects it."""

import subprocess
import sys

from tests.support import ROOT

# The last reference to the iterator goes in the thread that reads an example for it.
SCRIPT = """
import dataclasses, gc, itertools, os, sys, threading, time
from pathlib import Path
from jvlm.data.encode import Encode
from jvlm.data import pipeline
from jvlm.training import processors
from tests.training import support

folder = Path(sys.argv[1])
experiment = support.experiment(folder, support.write_examples(folder))
data = dataclasses.replace(experiment.data, read_threads=1, prefetch=1)
known, begun, read, numbers = [], threading.Event(), Encode.read, itertools.count(1)

def collecting(self, element, rng):
    if next(numbers) == 13:  # of the third window
        begun.wait()
        known.clear()
        gc.collect()
    return read(self, element, rng)

Encode.read = collecting
dataset, _ = pipeline.training_data(processors.new(experiment), data, seed=0)
iterator = iter(dataset)
next(iterator)
known.append(iterator)
iterator.own = iterator  # for the garbage collector alone to find
del iterator
begun.set()

def reading():
    return [t.name for t in threading.enumerate() if t.name.startswith(("jvlm-data", "grain-thread-prefetch"))]

limit = time.monotonic() + 30
while (known or reading()) and time.monotonic() < limit:
    time.sleep(0.01)
if known or reading():
    print("still there:", known, reading(), flush=True)
    os._exit(1)
"""


def test_a_reading_thread_may_collect_the_iterator_that_it_reads_for(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
