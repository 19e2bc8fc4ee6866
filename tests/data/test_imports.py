"""What reads and checks examples needs no accelerator library: a process that only reads starts in no time."""

import pytest

from tests.support import run_python

MODULES = (
    "answer_spans box_formats boxes chat_format columns config content control_tokens embedding errors "
    "examples file_kinds images mrope pixels rejections shard_set sharding shards stores template tool_calls "
    "turns values vocabulary"
).split()


@pytest.mark.parametrize("library", ["jax", "flax", "jvlm_kernels", "torch"])
def test_reading_examples_imports_no_library_of_models(library):
    imports = "; ".join(f"import jvlm.data.{name}" for name in MODULES)
    assert run_python(f"{imports}; import sys; print({library!r} in sys.modules)").strip() == "False"
