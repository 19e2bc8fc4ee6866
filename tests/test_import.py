"""Importing the library is free of side effects, and reaches everything of the public surface."""

import pytest

from tests.support import run_python

# The libraries that jvlm imports set variables of their own, so what counts is who does it.
_REPORT = """
import importlib, os, pkgutil, sys
setters = []
original = os._Environ.__setitem__
def record(self, key, value):
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in ("os", "_collections_abc", "collections.abc"):
        frame = frame.f_back
    setters.append((key, frame.f_globals.get("__name__", "")))
    original(self, key, value)
os._Environ.__setitem__ = record
{imports}
assert not [s for s in setters if s[1].split(".")[0] in ("jvlm", "jvlm_kernels")], setters
for name in ("torch", "transformers", "tensorflow"):
    assert name not in sys.modules, name
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge._backends, list(xla_bridge._backends)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import jvlm",
        "import jvlm; jvlm.load, jvlm.save, jvlm.PackedBatch, jvlm.Processor, jvlm.VLM, jvlm.generate",
        "import jvlm_kernels",
        "import jvlm\nfor m in pkgutil.walk_packages(jvlm.__path__, 'jvlm.'): importlib.import_module(m.name)",
    ],
    ids=["the package", "the public surface", "the kernels", "every module"],
)
def test_importing_starts_no_device_loads_no_torch_and_sets_no_variable(imports):
    run_python(_REPORT.format(imports=imports))


def test_importing_the_package_loads_nothing_heavy():
    run_python("import sys, jvlm\nassert not {'jax', 'flax', 'numpy', 'orbax', 'grain'} & set(sys.modules)")


def test_the_list_of_commands_loads_nothing_heavy():
    heavy = "{'jax', 'flax', 'numpy', 'tyro', 'transformers'}"
    run_python(
        f"import sys\nfrom jvlm import cli\nassert cli.main(['--help']) == 0\nassert not {heavy} & set(sys.modules)"
    )


def test_the_public_surface_is_what_the_design_says_and_nothing_else_resolves():
    run_python(
        """
import jvlm
for name in ("load", "save", "generate", "PackedBatch", "Processor", "VLM", "__version__"):
    assert name in jvlm.__all__ and getattr(jvlm, name) is not None, name
try:
    jvlm.train
except AttributeError as error:
    assert "no attribute 'train'" in str(error)
else:
    raise AssertionError("jvlm.train")
"""
    )
