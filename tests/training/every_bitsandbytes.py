"""The golden values of 8-bit moments are what the installed bitsandbytes gives: `make test-exports`."""

import os
import subprocess
import sys

from tests import support


def test_golden_values_are_those_of_bitsandbytes():
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT / ".venv/export-quantised")}
    words = [sys.executable, "-m", "tests.training.adam_8bit_golden", "--check"]
    done = subprocess.run(words, cwd=support.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "different from adam_8bit.npz: nothing" in done.stdout
