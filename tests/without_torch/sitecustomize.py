"""Processes with this folder in PYTHONPATH find no torch, as where jvlm alone is installed.

transformers imports torch beside its tokenizers where it is there: two and a half seconds of each process.
"""

from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


def _without_torch(name, path=None, target=None):
    return None if name == "torch" else _find_spec(name, path, target)


PathFinder.find_spec = staticmethod(_without_torch)
