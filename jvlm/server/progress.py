"""A line with tokens/s now and then, for who watches the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from jvlm.inference.async_engine import AsyncEngine
from jvlm.inference.requests import EngineStats
from jvlm.server.listen import print_line


async def tell_progress(engine: AsyncEngine, seconds: float, log: Callable[[str], None] = print_line) -> None:
    """Print a line every so many seconds in which there was work; 0 prints none."""
    before, then = engine.stats(), time.monotonic()
    while seconds > 0:
        await asyncio.sleep(seconds)
        now, stats = time.monotonic(), engine.stats()
        if stats.generation_tokens != before.generation_tokens or stats.num_requests_running:
            log(progress_line(before, stats, now - then))
        before, then = stats, now


def progress_line(before: EngineStats, stats: EngineStats, seconds: float) -> str:
    """Return what became of two statistics so many seconds apart."""
    prompt = (stats.prompt_tokens - before.prompt_tokens) / seconds
    generated = (stats.generation_tokens - before.generation_tokens) / seconds
    looked = stats.prefix_cache_queries - before.prefix_cache_queries
    hits = (stats.prefix_cache_hits - before.prefix_cache_hits) / looked if looked else 0.0
    return (
        f"jvlm: {prompt:,.0f} tokens/s of prompts ({hits:.0%} cached), {generated:,.0f} tokens/s generated; "
        f"{stats.num_requests_running} running, {stats.num_requests_waiting} waiting, "
        f"cache {stats.kv_cache_usage_perc:.0%}"
    )
