"""What NVIDIA's assembler makes of the kernels of a program compiled for a GPU.

XLA writes the kernels' PTX and how each is launched when it is asked to, and so does Mosaic GPU for its own; `ptxas -v`
says what a kernel needs of a multiprocessor (`pip install nvidia-cuda-nvcc`, or a CUDA toolkit).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from jvlm.errors import UserError

_MOSAIC_FOLDER = "MOSAIC_GPU_DUMP_TO"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Of one block of threads.

    Attributes:
      registers: of a thread.
      spilled: bytes a thread keeps in memory because it has no register for them, written and read.
      shared: bytes of shared memory.
      products: matrix instructions in the code, by kind: Hopper's "wgmma.mma_async", or "mma.sync", which every
        generation has.
    """

    name: str
    threads: int
    registers: int
    spilled: int
    shared: int
    products: dict[str, int]


def compile_with_kernels(lowered: jax.stages.Lowered, wanted: str) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """Return compiled program, and those of its kernels whose names match the pattern ``wanted``, in order of names."""
    with tempfile.TemporaryDirectory() as folder, _mosaic_writes_to(folder):
        program = lowered.compile(compiler_options={"xla_dump_to": folder})
        launches = "\n".join(path.read_text() for path in Path(folder).glob("*.thunk_sequence.txt"))
        kernels = [
            _read(path, launches)
            for path in Path(folder).glob("*.ptx")
            if re.search(rf"\.entry (?:{wanted})\(", path.read_text())
        ]
    return program, sorted(kernels, key=lambda kernel: kernel.name)


@contextlib.contextmanager
def _mosaic_writes_to(folder: str) -> Iterator[None]:
    """Mosaic GPU knows no option of the compiler, only the environment."""
    before = os.environ.get(_MOSAIC_FOLDER)
    os.environ[_MOSAIC_FOLDER] = folder
    try:
        yield
    finally:
        os.environ.pop(_MOSAIC_FOLDER)
        if before is not None:
            os.environ[_MOSAIC_FOLDER] = before


def _launch(name: str, ptx: Path, launches: str) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a block: from XLA's list of launches, or Mosaic's own for its kernels."""
    passes = ptx.with_suffix(".mlir-passes.log")
    if passes.is_file():
        threads = re.search(r"\.maxntid (\d+), 1, 1", ptx.read_text())
        shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes.read_text())
        return int(threads[1]), int(shared[1])
    launch = re.search(rf"\b{name}\b.* threads: \[(\d+), 1, 1\].*?shared_memory: (\d+) bytes", launches)
    return int(launch[1]), int(launch[2])


def _read(ptx: Path, launches: str) -> Kernel:
    """One kernel, from the file that holds it alone."""
    text = ptx.read_text()
    (name,) = re.findall(r"\.entry (\w+)\(", text)
    target = re.search(r"\.target (\w+)", text)[1]
    command = [_ptxas(), "-v", f"--gpu-name={target}", str(ptx), "--output-file", str(ptx.with_suffix(".cubin"))]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(f"ptxas refuses {name}: {completed.stderr}")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", completed.stderr)
    threads, shared = _launch(name, ptx, launches)
    kinds = re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", text)
    return Kernel(
        name=name.removesuffix("_mosaic_gpu_kernel"),
        threads=threads,
        registers=int(re.search(r"Used (\d+) registers", completed.stderr)[1]),
        spilled=sum(map(int, spills.groups())),
        shared=shared,
        products={kind: kinds.count(kind) for kind in sorted(set(kinds))},
    )


def _ptxas() -> str:
    """Return the assembler on the path, or beside the compiler of XLA."""
    inside = [Path(folder) / "nvidia/cu13/bin/ptxas" for folder in sys.path]
    program = next((str(path) for path in inside if path.is_file()), None) or shutil.which("ptxas")
    if program is None:
        raise UserError("no ptxas: pip install nvidia-cuda-nvcc, or PYTHONPATH=.venv/gpu-compiler after `make test`")
    return program
