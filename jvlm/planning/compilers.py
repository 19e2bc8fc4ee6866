"""Which compiler makes a plan, and whether it is the one that JAX belongs with."""

from __future__ import annotations

import importlib.metadata

import jax
from packaging.requirements import Requirement

from .chips import Topology

_TPU, _GPU = "libtpu", "jax-cuda13-pjrt"


def describe(topology: Topology) -> str:
    """Return the compiler for a topology with its version, JAX's, and a warning where JAX asks for another version.

    Another version often works all the same; what JAX asks for is what its authors test with.
    """
    name = _GPU if topology.switched else _TPU
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a libtpu that was copied, or named by TPU_LIBRARY_PATH
        return f"{name} of an unknown version, jax {jax.__version__}"
    wanted = asked_version(name)
    other = wanted is not None and not wanted.specifier.contains(version, prereleases=True)
    note = f" (WARNING: jax {jax.__version__} asks for {wanted.name}{wanted.specifier})" if other else ""
    return f"{name} {version}, jax {jax.__version__}{note}"


def asked_version(name: str) -> Requirement | None:
    """Return what the installed JAX asks for when it is installed with its extra for TPUs or GPUs; None if nothing."""
    if name == _GPU:  # asked for by the plugin, whose version is JAX's
        return Requirement(f"{name}=={jax.__version__}")
    for line in importlib.metadata.requires("jax") or ():
        requirement = Requirement(line)
        if requirement.name == name:
            return requirement
    return None
