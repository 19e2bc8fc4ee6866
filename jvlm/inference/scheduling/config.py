"""Sizes and goals of the scheduler."""

from __future__ import annotations

import dataclasses
import math

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What there is to give out, and how much of it one step may take.

    Attributes:
      num_pages: pages of the cache, page 0 included, which takes what empty rows write and is given to nobody.
      page_size: tokens of a page.
      max_slots: sequences that decode together.
      max_length: tokens of a sequence, prompt and answer together: the model's positions, or what a page table holds.
      prefill_tokens: sizes of prefills, of all chunks together, ascending; whole pages.
      prefill_chunks: most chunks, each of another sequence, in a prefill.
      prefill_past_pages: most pages of earlier tokens that all chunks of a prefill read together; None: any number.
      feature_slots: vision tokens of the feature pool; 0 for a model without a vision tower.
      encode_patches: most patches of an encode.
      singly: one picture in an encode, one prompt in a prefill and not before all of its pictures are encoded, so that
        what else runs does not change the shapes that a request is computed in.
      encode_tokens: most vision tokens of an encode; None: ``feature_slots``.
      prefix_cache: keep the pages of past sequences, and share them by content.
      feature_cache: keep features after their prompts; without it each is forgotten when no prompt needs it.
      cuts_prompts: prefill prompts in pieces where that is better; without it each is one chunk, and none may be longer
        than the largest of ``prefill_tokens``.
      decode_steps: most tokens that one decoding plan draws for a sequence.
      decode_seconds: how long such a plan may take: as long may a new request wait, and a token on its way out.
      tpot_goal: seconds between tokens that decoding sequences should see while others prefill; None: whatever gives
        most tokens a second (`jvlm.inference.scheduling.estimates.Pace`).
      reserve_tokens: most answer tokens that admission counts with.
      answer_ratio: share of max_tokens that answers are expected to take, before any has ended.
      prefix_order_below: waiting sequences below which the longest prefix goes first.
      max_passed: admissions of later sequences after which a waiting one goes first, whatever its priority.
      max_preemptions: after so many a sequence gets the pages of its whole length at once.

    Raises:
      UserError: sizes that do not fit one another.
    """

    num_pages: int
    page_size: int
    max_slots: int
    max_length: int
    prefill_tokens: tuple[int, ...] = (1024,)
    prefill_chunks: int = 8
    prefill_past_pages: int | None = None
    feature_slots: int = 0
    encode_patches: int = 0
    singly: bool = False
    encode_tokens: int | None = None
    prefix_cache: bool = True
    feature_cache: bool = True
    cuts_prompts: bool = True
    decode_steps: int = 1
    decode_seconds: float = 0.01
    tpot_goal: float | None = None
    reserve_tokens: int = 4096
    answer_ratio: float = 0.4
    prefix_order_below: int = 128
    max_passed: int = 64
    max_preemptions: int = 3

    def __post_init__(self):
        for name, least in (("num_pages", 2), ("page_size", 1), ("max_slots", 1), ("max_length", 2)):
            self._at_least(name, least)
        for name in ("prefill_chunks", "reserve_tokens", "decode_steps"):
            self._at_least(name, 1)
        sizes = self.prefill_tokens
        if not sizes or sorted(sizes) != list(sizes) or sizes[0] < 1 or any(size % self.page_size for size in sizes):
            raise UserError(
                f"prefill_tokens is {sizes}; it must be whole pages of {self.page_size}, the smallest first"
            )
        if not 0 < self.answer_ratio <= 1:
            raise UserError(f"answer_ratio is {self.answer_ratio}; it must be above 0 and at most 1")
        if self.tpot_goal is not None and not 0 < self.tpot_goal < math.inf:
            raise UserError(
                f"tpot_goal is {self.tpot_goal}; it must be a positive number of seconds, or None for most tokens/s"
            )
        if self.prefill_past_pages is not None and self.cuts_prompts and self.prefill_past_pages < self.table_width():
            raise UserError(
                f"prefill_past_pages is {self.prefill_past_pages}, and one chunk may have {self.table_width()} pages "
                "before it: raise the one, or lower max_length"
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def most_prefill_tokens(self) -> int:
        """Return the most tokens of a prefill."""
        return self.prefill_tokens[-1]

    @property
    def capacity(self) -> int:
        """Return the most tokens whose keys and values one sequence can keep."""
        return min(self.max_length, (self.num_pages - 1) * self.page_size)

    def pages(self, tokens: int) -> int:
        """Return how many pages hold so many tokens."""
        return -(-tokens // self.page_size)

    def table_width(self) -> int:
        """Return the length of a row of the page table."""
        return self.pages(self.capacity)
