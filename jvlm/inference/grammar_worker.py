"""What the process that checks grammars runs. It imports neither jax nor anything of a model."""

from __future__ import annotations

import resource
from pathlib import Path


def begin(memory: int) -> None:
    """Load the library, and allow this process so many bytes of address space beyond what it has now."""
    import llguidance

    llguidance.LLTokenizer("byte")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def check(grammar: str) -> str:
    """Return what is wrong with a grammar of llguidance; "" if nothing is."""
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    error = llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
    if error:
        return error
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    matcher.compute_bitmask()
    return matcher.get_error()
