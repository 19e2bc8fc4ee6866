"""A run that nothing breaks, for the tests of those that are killed or shared among processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rl import killed
from tests.rl.support import write_prompts


@pytest.fixture(scope="package")
def whole(tmp_path_factory) -> Path:
    """The folder of four steps in this process, as `tests.rl.killed` makes them in processes of their own."""
    folder = tmp_path_factory.mktemp("whole")
    write_prompts(folder)
    killed.main(str(folder), 4)
    return folder
