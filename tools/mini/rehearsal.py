"""A reward for rehearsals: what a model of a few steps can earn some of, so that its answers differ in it."""

from __future__ import annotations

import difflib
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """Return how alike an answer and its reference are, letter by letter, from 0 to 1; the form is verl's."""
    return difflib.SequenceMatcher(None, solution_str, str(ground_truth), autojunk=False).ratio()
