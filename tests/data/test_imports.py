"""What reads, checks and packs examples needs no accelerator library: a process that only reads starts in no time."""

import pkgutil

import pytest

import jvlm.data
from tests.support import run_python

MODULES = [module.name for module in pkgutil.walk_packages(jvlm.data.__path__, "jvlm.data.")]


@pytest.fixture(scope="module")
def imported():
    """Names of all modules that are loaded once every module of jvlm.data is, in a process where jax cannot be.

    Grain imports jax by itself, so it comes first.
    """
    code = f"import sys, grain; sys.modules['jax'] = None; import {', '.join(MODULES)}; print(*sys.modules)"
    return set(run_python(code).split())


@pytest.mark.parametrize(
    "library", ["flax", "jvlm_kernels", "torch", "pyarrow", "av", "pebble", "tensorflow_datasets", "jvlm.models.batch"]
)
def test_reading_examples_imports_no_library_of_models_and_no_jax(imported, library):
    assert imported >= set(MODULES)
    assert library not in imported
