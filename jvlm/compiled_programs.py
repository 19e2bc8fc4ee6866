"""Where JAX keeps compiled programs, so that a command which ran before compiles little or nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import zlib
from pathlib import Path

# Seconds of compilation from which on a program is kept, and bytes of all of them: those not used longest go first.
_LEAST_SECONDS, _MOST_BYTES = 0.05, 4 * 2**30


def folder() -> Path:
    """Return the folder for programs compiled on this machine: a folder of the user's cache.

    Programs for a CPU use what that CPU can do, so machines that share a home have folders of their own.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "jvlm" / "compiled" / f"{platform.machine()}-{_cpu_features():08x}"


def keep() -> None:
    """Let JAX keep the programs it compiles in `folder`. Call it before JAX is imported.

    Where the environment says where they go (``JAX_COMPILATION_CACHE_DIR``) or that there are none
    (``JAX_ENABLE_COMPILATION_CACHE=false``), that holds. The processes that this one starts do the same.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder())
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
    if importlib.util.find_spec("filelock"):  # without it JAX refuses a limit
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST_BYTES))


def _cpu_features() -> int:
    """Return a number for what this CPU can do, where the system tells; 0 elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return zlib.crc32(" ".join(sorted(features.split())).encode()) if features else 0
