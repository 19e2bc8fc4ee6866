"""Libraries of the extra ``jvlm[eval]``."""

from __future__ import annotations

import importlib
from types import ModuleType

from jvlm.errors import UserError


def require(name: str) -> ModuleType:
    """Return a module of the extra. Raises UserError, saying what to install, if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this score needs {error.name or name}: pip install 'jvlm[eval]'") from error
