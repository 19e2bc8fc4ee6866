"""Commands keep the programs that JAX compiles, unless the environment says otherwise."""

import pytest

from tests.support import run_python

_COMMAND = """
import os, pathlib
for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    os.environ.pop(name, None)
os.environ["XDG_CACHE_HOME"] = {cache!r}
os.environ.update({environment!r})
from jvlm import cli
assert cli.main(["configs"]) == 0
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(1.0)
kept = [str(p) for p in pathlib.Path({cache!r}).rglob("*-cache")]
assert bool(kept) == {kept}, (jax.config.jax_compilation_cache_dir, kept)
"""


@pytest.mark.parametrize(
    ("environment", "kept"),
    [({}, True), ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, False)],
    ids=["by default", "switched off"],
)
def test_a_command_keeps_what_is_compiled_in_the_users_cache(tmp_path, environment, kept):
    run_python(_COMMAND.format(cache=str(tmp_path), environment=environment, kept=kept))
