"""Kernels are traced for every platform, as users get them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _every_platform(every_platform):
    """Each test of a kernel has all its implementations."""
