"""Kernels inside `jax.shard_map`: split rows and heads, context parallelism, split vocabulary."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT, cpu_devices

CASES = [
    (case, implementation)
    for case in ("attention_over_rows_and_heads", "context_parallelism", "ring")
    for implementation in ("xla", "pallas_tpu", "pallas_gpu")
]


CASES += [(case, "xla") for case in ("split_vocabulary", "split_tokens_and_vocabulary")]


@pytest.fixture(scope="module")
def errors():
    """(case, implementation) -> the traceback of what failed on four devices, or None."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.many_devices", *map(" ".join, CASES)],
        cwd=ROOT,
        env={**os.environ, **cpu_devices(4)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = (json.loads(line) for line in result.stdout.splitlines())
    return {(case, implementation): error for case, implementation, error in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_parts_equal_the_whole(errors, case, implementation):
    assert errors[case, implementation] is None, errors[case, implementation]
