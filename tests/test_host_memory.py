"""Freed memory is used again where the CPU is the only device, and is left to the system beside an accelerator."""

import json
import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import ctypes, json, resource, threading
from jvlm.host_memory import keep_freed_memory
libc, size, faults = ctypes.CDLL(None), 48 << 20, []
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
said = keep_freed_memory()

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(4):  # each step of a training may be run by another thread
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
print(json.dumps([said, faults]))
"""


@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("tpu", False), ("cuda,cpu", False)])
def test_pages_once_touched_are_not_faulted_in_again(platforms, kept):
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=True,
    )
    said, (first, *later) = json.loads(done.stdout)
    kept = kept and platform.libc_ver()[0] == "glibc"
    assert said is kept
    assert all(faults < 0.1 * first if kept else faults > 0.9 * first for faults in later)
