"""The server can be imported where there is no device."""

from tests.support import run_python


def test_the_server_imports_no_jax():
    code = "import sys, jvlm.server.app; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    assert run_python(code).strip() == "[]"
