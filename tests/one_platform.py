"""Tracing for the device at hand alone.

An operation of jvlm_kernels holds one branch for each platform, so that a program can be lowered for any of them. The
suite's programs run where they are traced, and the Pallas kernels of the branches that are never taken cost a third of
the time to trace a training step. `tests/kernels`, and tests that ask for the fixture ``every_platform``, trace them
all, as do the processes that tests start.
"""

import jax
import pytest
from jvlm_kernels import platforms

_run_all = platforms.Operation.run


def _run_here(operation, spec, names, function, *arrays):
    """Call the implementation for every device, unless the program is compiled for another device or by name."""
    if jax.default_backend() == "cpu" and platforms.target_platform() == "cpu":
        named = {platforms.load(operation.modules[name]).PLATFORM: name for name in names}
        here = named.get("cpu", named.get(None))
        names = names if here is None else (here,)
    return _run_all(operation, spec, names, function, *arrays)


platforms.Operation.run = _run_here


@pytest.fixture(scope="module")
def every_platform():
    """Operations have the branches of all platforms, as they have outside the suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms.Operation, "run", _run_all)
        jax.clear_caches()  # of what was traced without them
        yield
