"""Kernels inside `jax.shard_map`: split rows and heads, context parallelism, split vocabulary."""

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


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_parts_equal_the_whole(case, implementation):
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.many_devices", case, implementation],
        cwd=ROOT,
        env={**os.environ, **cpu_devices(4)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
