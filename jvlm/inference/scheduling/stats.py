"""Counters of the scheduler."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class SchedulerStats:
    """Counters since the start and gauges of now, under vLLM's names without their prefix.

    Attributes:
      num_requests_running, num_requests_waiting: answers in slots, and waiting ones.
      kv_cache_usage_perc, encoder_cache_usage_perc: share of pages and of feature slots in use, 0..1.
      prefix_cache_queries, prefix_cache_hits: tokens that were looked for among cached pages, and found.
      mm_cache_queries, mm_cache_hits: pictures whose features were needed, and found.
      num_preemptions: sequences that gave their pages to others.
      prompt_tokens, generation_tokens: computed tokens of prompts (cached ones not among them), and answer tokens.
      spec_decode_num_drafts, spec_decode_num_draft_tokens, spec_decode_num_accepted_tokens: drafts, their tokens, and
        those that were right.
      late_results: results that came when their sequence had left its slot, and were dropped.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0
    encoder_cache_usage_perc: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    mm_cache_queries: int = 0
    mm_cache_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    late_results: int = 0
