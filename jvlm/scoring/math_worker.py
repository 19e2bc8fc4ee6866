"""What the processes of `jvlm.scoring.maths` run. Imports neither jax nor anything of a model."""

from __future__ import annotations

import logging
import resource


def begin(memory: int) -> None:
    """Limit this process to so many bytes of address space, and load what each task needs."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable(logging.CRITICAL)  # Math-Verify logs every text that it cannot read
    import math_verify  # noqa: F401


def equal(gold: str, answer: str) -> bool | None:
    """Return whether two LaTeX expressions are equal; None where the reference cannot be read."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # time is limited by killing the process: alarms work in main threads only
    settings = {"extraction_config": [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]}
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=False, **settings)
    if all(isinstance(value, str) for value in expected):  # no expression of it
        return None
    given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=False, **settings)
    return bool(given) and bool(verify(expected, given, timeout_seconds=None, strict=True, raise_on_error=False))
