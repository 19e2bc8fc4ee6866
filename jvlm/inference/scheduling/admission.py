"""Which requests are refused, and what those that begin are given: a slot, pages, and slots for their features."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jvlm.errors import UserError
from jvlm.inference.scheduling.config import SchedulerConfig
from jvlm.inference.scheduling.estimates import AnswerLengths
from jvlm.inference.scheduling.features import FeatureTable
from jvlm.inference.scheduling.pages import PagePool
from jvlm.inference.scheduling.sequence import Sequence
from jvlm.inference.scheduling.sequence_spec import SequenceSpec
from jvlm.inference.scheduling.slots import Slots
from jvlm.inference.scheduling.stats import SchedulerStats


def check(spec: SequenceSpec, config: SchedulerConfig) -> int:
    """Return the most answer tokens that there is room for.

    Raises:
      UserError: a request that could never run: too long, too many answers, or pictures that are too large.
    """
    length, name = len(spec.tokens), f"request {spec.request_id!r}"
    if not length:
        raise UserError(f"{name}: the prompt is empty; ask something")
    if length >= config.capacity:
        raise UserError(
            f"{name}: the prompt has {length} tokens, and a sequence may have {config.capacity} with its answer; "
            "shorten it, or lower max_pixels"
        )
    if spec.n > config.max_slots:
        raise UserError(f"{name}: n is {spec.n}, and at most {config.max_slots} answers run together; lower n")
    pages = length // config.page_size + spec.n
    if pages > config.num_pages - 1:
        raise UserError(
            f"{name}: the prompt and {spec.n} answers need {pages} pages at least, and there are "
            f"{config.num_pages - 1}; lower n or shorten the prompt"
        )
    for number, media in enumerate(spec.media):
        if media.patches > config.encode_patches:
            raise UserError(
                f"{name}: image {number + 1} has {media.patches} patches, and the encoder takes "
                f"{config.encode_patches} at a time; make it smaller, or lower max_pixels"
            )
        most = config.feature_slots if config.encode_tokens is None else config.encode_tokens
        if media.tokens > most:
            raise UserError(
                f"{name}: image {number + 1} has {media.tokens} vision tokens, and an encode gives at most {most}; "
                "make it smaller, or lower max_pixels"
            )
    tokens = sum({media.content: media.tokens for media in spec.media}.values())
    if tokens > config.feature_slots:
        raise UserError(
            f"{name}: its images have {tokens} vision tokens, and {config.feature_slots} can be kept; "
            "give fewer or smaller images"
        )
    return min(spec.max_tokens, config.capacity - length)


class Admission:
    """Gives sequences what they need to run, all or nothing, and takes it back."""

    def __init__(self, config: SchedulerConfig, stats: SchedulerStats):
        self.config, self.stats = config, stats
        self.pages = PagePool(config.num_pages, config.prefix_cache)
        self.features = FeatureTable(config.feature_slots, config.feature_cache)
        self.slots = Slots(config.max_slots)
        self.lengths = AnswerLengths(config)
        self.tables = np.zeros((config.max_slots, config.table_width()), np.int32)  # pages of each slot's sequence

    def prefix_length(self, sequence: Sequence) -> int:
        """Return how many pages of a sequence are in the cache, and may be used."""
        return self.pages.match_length(sequence.keys[: self._usable(sequence)])

    def admit(self, sequences: list[Sequence], reserved: int | None, epoch: int) -> bool:
        """Give sequences that start together slots, and the first of them pages and slots for features.

        Pages are given for the tokens that are known; there must be room for what the answers of all are expected to
        need besides, unless nothing else runs.

        Args:
          reserved: `growth` of what runs; None if nothing does.
        """
        if self.slots.free < len(sequences):
            return False
        first, config = sequences[0], self.config
        length, usable = len(first.tokens), self._usable(first)
        if config.prefix_cache:
            first.extend_keys(usable, config.page_size)
        found = self.pages.match(first.keys[:usable])
        taken_whole = self.is_reserved(first)
        total = config.pages(first.prompt_length + first.limit if taken_whole else length)
        need = total - len(found)
        spare = self.pages.available - need - sum(self.pages.references(page) == 0 for page in found)
        if spare < 0 or (reserved is not None and spare < reserved + self.growth(sequences)):
            return False
        start = len(found) * config.page_size
        wanted = {first.feature_keys[i]: first.spec.media[i].tokens for i in first.media_from(start)}
        encoded = self.features.acquire(wanted)
        if encoded is None:
            return False
        self.pages.share(found)
        first.pages = [*found, *(self.pages.take(need) or ())]
        first.registered = len(found)
        first.computed = first.cached = start
        first.target, first.held = length, tuple(wanted)
        for sequence in sequences:
            sequence.slot, sequence.generation = self.slots.take()
            sequence.state = "prefilling" if sequence is first else "forking"
            sequence.cached, sequence.epoch = start, epoch
        self.set_table(first)
        self.stats.prefix_cache_queries += length
        self.stats.prefix_cache_hits += start
        self.stats.mm_cache_queries += len(wanted)
        self.stats.mm_cache_hits += encoded
        return True

    def fork(self, first: Sequence, others: list[Sequence]) -> None:
        """Let the other answers of a request share the pages of its prompt; who writes to a shared one copies it."""
        for sequence in others:
            sequence.pages = first.pages[: self.config.pages(first.computed)]
            self.pages.share(sequence.pages)
            sequence.computed, sequence.registered = first.computed, 0
            sequence.state = "decoding"
            self.set_table(sequence)

    def grow(self, sequence: Sequence, tokens: int) -> tuple[tuple[int, int], ...] | None:
        """Give a sequence pages to write so many tokens behind the computed ones.

        Returns:
          (from, to) of pages to copy before; None if there are not enough pages, and then none is given.
        """
        page_size = self.config.page_size
        new = max(self.config.pages(sequence.computed + tokens) - len(sequence.pages), 0)
        at = sequence.computed // page_size
        shared = at < len(sequence.pages) and self.pages.references(sequence.pages[at]) > 1
        taken = self.pages.take(new + shared)
        if taken is None:
            return None
        copies: tuple[tuple[int, int], ...] = ()
        if shared:
            old, own = sequence.pages[at], taken.pop()
            sequence.pages[at] = own
            self.pages.release((old,))
            copies = ((old, own),)
        sequence.pages += taken
        if taken or shared:
            self.set_table(sequence)
        return copies

    def register(self, sequence: Sequence, tokens: int, epoch: int) -> None:
        """Keep the pages of a sequence's first tokens, which are computed, under their content."""
        if not self.config.prefix_cache or sequence.epoch != epoch:
            return
        count = tokens // self.config.page_size
        sequence.extend_keys(count, self.config.page_size)
        changed = False
        for i in range(sequence.registered, count):
            page = self.pages.register(sequence.pages[i], sequence.keys[i])
            changed |= page != sequence.pages[i]
            sequence.pages[i] = page
        sequence.registered = max(sequence.registered, count)
        if changed:
            self.set_table(sequence)

    def release_features(self, sequence: Sequence) -> None:
        """Let go of the pictures that a sequence held."""
        for key in sequence.held:
            self.features.release(key)
        sequence.held = ()

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence has."""
        self.release_features(sequence)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.registered, sequence.computed, sequence.in_flight = [], 0, 0, 0
        if sequence.slot >= 0:
            self.tables[sequence.slot] = 0
            self.slots.release(sequence.slot)
            sequence.slot = -1

    def set_table(self, sequence: Sequence) -> None:
        """Write a sequence's pages into the table."""
        row = self.tables[sequence.slot]
        row[: len(sequence.pages)] = sequence.pages
        row[len(sequence.pages) :] = 0

    def is_reserved(self, sequence: Sequence) -> bool:
        """Return whether a sequence has, or is to get, the pages of its whole length, and is not preempted any more."""
        return sequence.preemptions >= self.config.max_preemptions

    def _usable(self, sequence: Sequence) -> int:
        """Return how many pages may be taken from the cache: at least one token is always computed."""
        return 0 if sequence.spec.whole_prompt else (len(sequence.tokens) - 1) // self.config.page_size

    def growth(self, sequences: Iterable[Sequence]) -> int:
        """Return the number of pages that the rest of answers is expected to need."""
        return sum(map(self._growth, sequences))

    def _growth(self, sequence: Sequence) -> int:
        if self.is_reserved(sequence):
            return 0
        left = self.lengths.expected(sequence.limit - sequence.answered)
        return self.config.pages(len(sequence.tokens) + left) - self.config.pages(len(sequence.tokens))
