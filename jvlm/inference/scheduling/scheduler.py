"""The scheduler: requests in, plans of what runs next out."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jvlm.inference.scheduling import admission
from jvlm.inference.scheduling.admission import Admission
from jvlm.inference.scheduling.config import SchedulerConfig
from jvlm.inference.scheduling.estimates import Kind, Pace, Prompts
from jvlm.inference.scheduling.plans import (
    ON_DEVICE,
    Chunk,
    Decode,
    Encode,
    Picture,
    Plan,
    Prefill,
    Result,
    Results,
    Row,
)
from jvlm.inference.scheduling.sequence import Sequence
from jvlm.inference.scheduling.sequence_spec import SequenceSpec
from jvlm.inference.scheduling.stats import SchedulerStats
from jvlm.inference.scheduling.waiting import WaitingQueue


class Scheduler:
    """Continuous batching over a paged cache with shared prefixes (vLLM, arXiv 2309.06180; SGLang, arXiv 2312.07104).

    `next` may be called before the results of earlier plans are given to `finish`, which takes them in order; the
    device then never waits for the host. Sequences are identified by number and (slot, generation), so that a result
    that comes too late reaches nobody.
    """

    def __init__(self, config: SchedulerConfig, stats: SchedulerStats | None = None):
        self.config, self._stats = config, SchedulerStats() if stats is None else stats
        self.admission = Admission(config, self._stats)
        self.waiting = WaitingQueue(config.prefix_order_below, config.max_passed)
        self.running: list[Sequence] = []  # in the order of their admission
        self._sequences: dict[int, Sequence] = {}
        self._requests: dict[str, list[Sequence]] = {}
        self._deadlines: dict[int, int] = {}
        self._pace = Pace(config)
        self._encoded_last = False
        self._numbers = self._arrivals = self._unread = self._epoch = 0

    @property
    def has_work(self) -> bool:
        """Return whether a sequence waits or runs."""
        return bool(self._sequences)

    @property
    def counters(self) -> SchedulerStats:
        """The counters that go on, for a scheduler that takes the place of this one."""
        return self._stats

    @property
    def size(self) -> int:
        """Return how many answers wait or run."""
        return len(self._sequences)

    def add(self, spec: SequenceSpec) -> int:
        """Let a request wait. Returns the most answer tokens that it can have.

        Raises:
          UserError: it could never run.
          ValueError: a request of this name is there already.
        """
        if spec.request_id in self._requests:
            raise ValueError(f"request {spec.request_id!r} is there already")
        limit = admission.check(spec, self.config)
        sequences = Sequence.all_of(spec, self._numbers, self._arrivals, limit, self.config)
        self._numbers += spec.n
        self._arrivals += 1
        self._requests[spec.request_id] = sequences
        self._sequences |= {sequence.number: sequence for sequence in sequences}
        self.waiting.add(list(sequences))
        return limit

    def abort(self, request_id: str) -> bool:
        """Forget a request in whatever state it is, and free all that it has. Returns whether it was there."""
        sequences = self._requests.get(request_id)
        if sequences is None:
            return False
        for item in [item for item in self.waiting if item.first.spec.request_id == request_id]:
            self.waiting.remove(item, admitted=False)
        for sequence in list(sequences):
            self._end(sequence)
        return True

    def is_current(self, row: Row) -> bool:
        """Return whether the result of a row still counts: its sequence has not ended or left the slot."""
        return row.sequence in self._sequences and self.admission.slots.is_current(row.slot, row.generation)

    def next(self) -> Plan | None:
        """Return what runs next; None if nothing does before the results of earlier plans are known, or at all."""
        self._admit()
        decoding = any(s.state == "decoding" and s.planned < s.limit for s in self.running)
        prompts = self._prompts()
        plan: Plan | None = None
        if not decoding or (prompts is not None and self._pace.prompts_are_due(prompts)):
            plan = self._encode_or_prefill()
        if plan is None and decoding:
            plan = self._decode(prompts)
            if plan is None:  # it waits for tokens, or was preempted
                plan = self._encode_or_prefill()
        if plan is None:
            if self.has_work and not self._unread:
                raise RuntimeError("the scheduler has work and no plan")
            return None
        self._pace.planned(_kind(plan), _length(plan), prompts)
        self._encoded_last = isinstance(plan, Encode)
        self._unread += 1
        for row, steps in zip(plan.rows, _steps(plan), strict=True):
            self._sequences[row.sequence].in_flight += steps
            self.admission.slots.planned(row.slot)
        return plan

    def finish(self, plan: Plan, results: Results | None = None, seconds: float | None = None) -> None:
        """Take the results of the oldest plan that has none yet.

        Args:
          results: of each row that `is_current`, by the number of its sequence; others are dropped.
          seconds: that the plan took.
        """
        self._unread -= 1
        if seconds is not None:
            self._pace.took(_kind(plan), seconds / _length(plan))
        if isinstance(plan, Prefill):
            for chunk in plan.chunks:
                if self.is_current(chunk.row):
                    sequence = self._sequences[chunk.row.sequence]
                    self.admission.register(sequence, min(chunk.stop, len(sequence.tokens)), self._epoch)
        drafted = plan.drafted.tolist() if isinstance(plan, Decode) else [0] * len(plan.rows)
        for row, steps, guessed in zip(plan.rows, _steps(plan), drafted, strict=True):
            current = self.is_current(row)
            self.admission.slots.read(row.slot)
            if not current:
                self._stats.late_results += 1
                continue
            if results is None or row.sequence not in results:
                raise KeyError(f"no result for answer {row.index} of request {row.request_id!r}")
            self._take(self._sequences[row.sequence], results[row.sequence], steps, guessed)

    def fail(self, plan: Plan) -> list[str]:
        """Abort every request in a plan that could not be executed. Returns their names."""
        self._unread -= 1
        for row in plan.rows:
            self.admission.slots.read(row.slot)
        return self.drop(plan)

    def drop(self, part: Plan) -> list[str]:
        """Abort every request in a part of a plan that is not executed; its results are read without it.

        Returns:
          their names: also those that wait for a picture of the part.
        """
        if isinstance(part, Encode):
            lost = {picture.key for picture in part.pictures}
            hit = [s.spec.request_id for s in self.running if lost.intersection(s.held)]
            self.admission.features.lose(lost)
        elif isinstance(part, Prefill):
            hit = [chunk.row.request_id for chunk in part.chunks if self.is_current(chunk.row)]
        else:
            hit = [row.request_id for row in part.rows if self.is_current(row)]
        names = list(dict.fromkeys(hit))
        for name in names:
            self.abort(name)
        return names

    def forget(self) -> None:
        """Use no page and no feature of before again: the weights have changed. Sequences that run keep theirs."""
        self._epoch += 1
        self.admission.pages.forget()
        self.admission.features.forget()

    def stats(self) -> SchedulerStats:
        """Return the counters of now."""
        return dataclasses.replace(
            self._stats,
            num_requests_running=len(self.running),
            num_requests_waiting=len(self._sequences) - len(self.running),
            kv_cache_usage_perc=self.admission.pages.usage,
            encoder_cache_usage_perc=self.admission.features.usage,
        )

    def _admit(self) -> None:
        """Begin waiting requests while there is room."""
        if not len(self.waiting) or not self.admission.slots.free:
            return
        reserved = self.admission.growth(self.running) if self.running else None
        while len(self.waiting) and self.admission.slots.free:
            for item in self.waiting.candidates(self.admission.prefix_length):
                if self.admission.admit(item.sequences, reserved, self._epoch):
                    break
            else:
                return
            self.waiting.remove(item, admitted=True)
            self.running += item.sequences
            reserved = (reserved or 0) + self.admission.growth(item.sequences)
            self._deadlines |= {sequence.number: item.deadline for sequence in item.sequences}

    def _prompts(self) -> Prompts | None:
        """Return what waits for a prefill; None if nothing does."""
        prefilling = [s for s in self.running if s.state == "prefilling"]
        tokens = sum(s.target - s.computed for s in prefilling)
        if not tokens:
            return None
        waiting = sum(s.state in ("prefilling", "forking") for s in self.running)
        config = self.config
        fullness = len(prefilling) / (1 if config.singly else config.prefill_chunks)
        if config.prefill_past_pages:
            past = sum(s.computed // config.page_size for s in prefilling)
            fullness = max(fullness, past / config.prefill_past_pages)
        features = self.admission.features
        pictures = any(not features[key].encoded for s in prefilling for key in s.feature_keys if key in s.held)
        return Prompts(tokens, waiting, len(self.running) - waiting, fullness, pictures)

    def _encode_or_prefill(self) -> Encode | Prefill | None:
        """Return a step towards the next first tokens.

        Where both can run, encodes and prefills take turns; without a goal, pictures are encoded until a prefill is
        full.
        """
        if self._encoded_last if self.config.tpot_goal is not None else self._fills_a_prefill():
            return self._prefill() or self._encode()
        return self._encode() or self._prefill()

    def _fills_a_prefill(self) -> bool:
        """Return whether the first prompts, up to one that lacks features, are as many tokens as a prefill takes."""
        ready = 0
        for sequence in self.running:
            if sequence.state == "prefilling":
                encoded = self._first_without_features(sequence)
                ready += encoded - sequence.computed
                if ready >= self.config.most_prefill_tokens:
                    return True
                if encoded < sequence.target:
                    return False
        return False

    def _encode(self) -> Encode | None:
        """Return the pictures of admitted sequences that are not encoded, as many as one pass takes."""
        features, config = self.admission.features, self.config
        patches, pictures = 0, []
        tokens = config.feature_slots if config.encode_tokens is None else config.encode_tokens
        for sequence in self.running:
            if sequence.state != "prefilling":
                continue
            for number, media in enumerate(sequence.spec.media):
                key = sequence.feature_keys[number]
                if key not in sequence.held or features[key].encoded:
                    continue
                if patches + media.patches > config.encode_patches or tokens < media.tokens:
                    continue
                if config.singly and pictures:
                    continue
                patches, tokens = patches + media.patches, tokens - media.tokens
                features[key].encoded = True
                slots = features[key].slots
                pictures.append(Picture(sequence.spec.request_id, number, key, slots, media.patches))
        return Encode(tuple(pictures)) if pictures else None

    def _prefill(self) -> Prefill | None:
        """Return chunks of admitted sequences, as many tokens as one prefill takes."""
        left, chunks, page_size = self.config.most_prefill_tokens, [], self.config.page_size
        past = math.inf if self.config.prefill_past_pages is None else self.config.prefill_past_pages
        for sequence in [s for s in self.running if s.state == "prefilling"]:
            if not left or len(chunks) == (1 if self.config.singly else self.config.prefill_chunks):
                break
            encoded = self._first_without_features(sequence)
            if self.config.singly and encoded < sequence.target:
                continue
            stop = min(sequence.computed + left, sequence.target, encoded)
            if stop < sequence.target:
                if not self.config.cuts_prompts:
                    continue
                stop -= stop % page_size
            if stop <= sequence.computed or sequence.computed // page_size > past:
                continue
            left -= self.config.pages(stop - sequence.computed) * page_size
            past -= sequence.computed // page_size
            chunks.append(self._chunk(sequence, stop))
        return Prefill(tuple(chunks)) if chunks else None

    def _first_without_features(self, sequence: Sequence) -> int:
        """Return the first index that is fed by a picture that is not encoded."""
        index = sequence.spec.vision_index[sequence.computed :]
        missing = np.zeros(len(index), bool)
        for key, media in zip(sequence.feature_keys, sequence.spec.media, strict=True):
            if key in sequence.held and not self.admission.features[key].encoded:
                missing |= (index >= media.first) & (index < media.first + media.tokens)
        return sequence.computed + int(np.argmax(missing)) if missing.any() else sequence.target

    def _chunk(self, sequence: Sequence, stop: int) -> Chunk:
        """Return the next chunk of a sequence. After the last one of a prompt its answers go their own ways."""
        start = sequence.computed
        feature_index = np.full(stop - start, -1, np.int32)
        index = sequence.spec.vision_index[start:stop]
        for key, media in zip(sequence.feature_keys, sequence.spec.media, strict=True):
            here = np.flatnonzero((index >= media.first) & (index < media.first + media.tokens))
            if here.size:
                slots = self.admission.features[key].slots
                feature_index[here] = slots[index[here] - media.first]
        sequence.computed = stop
        samples: list[Sequence] = []
        if stop == sequence.target:
            self.admission.release_features(sequence)
            sequence.state = "decoding"
            forks = [s for s in self._requests[sequence.spec.request_id] if s.state == "forking"]
            self.admission.fork(sequence, forks)
            samples = [sequence, *forks]
        self._stats.prompt_tokens += stop - start
        return Chunk(
            row=sequence.row(stop - sequence.prompt_length),
            start=start,
            tokens=np.array(sequence.tokens[start:stop], np.int32),
            positions=sequence.positions(start, stop),
            feature_index=feature_index,
            table=self.admission.tables[sequence.slot].copy(),
            samples=tuple(s.row(stop - s.prompt_length) for s in samples),
            cached=sequence.cached,
        )

    def _decode(self, prompts: Prompts | None) -> Decode | None:
        """Return steps of every sequence that has a token to go on from, while prompts wait."""
        ready = [s for s in self.running if s.state == "decoding" and s.planned < s.limit]
        singly = [s for s in ready if s.needs_last_token]
        if any(s.in_flight for s in singly):
            return None
        most = 1
        if not singly:
            most = self._pace.plan_steps(prompts)
        copies: dict[int, tuple[tuple[int, int], ...]] = {}
        drafts: dict[int, tuple[int, ...]] = {}
        steps: dict[int, int] = {}
        for sequence in sorted(ready, key=_age):
            if sequence.state != "decoding":  # an older one took its pages
                continue
            guessed = ()
            if sequence.drafts is not None and not sequence.in_flight:
                guessed = sequence.drafts.propose(sequence.tokens, sequence.limit - sequence.answered - 1)
            count = min(most, sequence.limit - sequence.planned)
            grown = self.admission.grow(sequence, max(count, 1 + len(guessed)))
            if grown is None:
                guessed, count = (), 1
            while grown is None and sequence.state == "decoding":
                grown = self.admission.grow(sequence, 1)
                if grown is None:
                    self._preempt(self._youngest() or sequence)
            if grown is not None:
                number = sequence.number
                copies[number], drafts[number], steps[number] = grown, guessed, count
        rows = [s for s in ready if s.state == "decoding" and s.number in copies]
        if not rows:
            return None
        width = 1 + max(len(drafts[s.number]) for s in rows)
        tokens = np.zeros((len(rows), width), np.int32)
        for i, sequence in enumerate(rows):
            guessed = drafts[sequence.number]
            tokens[i, 0] = ON_DEVICE if sequence.in_flight else sequence.tokens[-1]
            tokens[i, 1 : 1 + len(guessed)] = guessed
        slots = np.array([s.slot for s in rows], np.int32)
        plan = Decode(
            rows=tuple(s.row(s.planned) for s in rows),
            slots=slots,
            draws=np.array([s.planned for s in rows], np.int32),
            steps=np.array([steps[s.number] for s in rows], np.int32),
            tokens=tokens,
            drafted=np.array([len(drafts[s.number]) for s in rows], np.int32),
            starts=np.array([s.computed for s in rows], np.int32),
            positions=np.array([s.next_position() for s in rows], np.int32),
            tables=self.admission.tables[slots],
            copies=tuple(copy for s in rows for copy in copies[s.number]),
        )
        for sequence in rows:
            sequence.computed += steps[sequence.number]
        return plan

    def _youngest(self) -> Sequence | None:
        """Return the sequence whose pages others may have: the youngest, of those the one with the fewest tokens."""
        open_to = [s for s in self.running if s.pages and not self.admission.is_reserved(s)]
        return max(open_to, key=lambda s: (*_age(s)[:2], -s.answered, s.index), default=None)

    def _preempt(self, sequence: Sequence) -> None:
        """Take all that a sequence has, and let it wait; its tokens stay. Tokens in flight are drawn again, alike."""
        together = [sequence]
        if sequence.state == "prefilling":
            together += [s for s in self._requests[sequence.spec.request_id] if s.state == "forking"]
        for one in together:
            self.admission.release(one)
            one.state = "waiting"
            one.preemptions += 1
            self.running.remove(one)
        self.waiting.add(together, self._deadlines[sequence.number])
        self.admission.lengths.preempted()
        self._stats.num_preemptions += 1

    def _take(self, sequence: Sequence, result: Result, steps: int, drafted: int) -> None:
        """Add the tokens that were drawn for a sequence."""
        count = len(result.tokens)
        if not 1 <= count <= steps + drafted or (count < steps and not result.ended):
            raise ValueError(f"{count} tokens for a row that draws {steps}, with {drafted} drafted ones")
        sequence.in_flight -= steps
        sequence.tokens.extend(result.tokens)
        if drafted:
            sequence.computed += count - 1
        self._stats.generation_tokens += count
        if drafted and sequence.drafts is not None:
            sequence.drafts.observe(len(sequence.tokens), drafted, count - 1)
            self._stats.spec_decode_num_drafts += 1
            self._stats.spec_decode_num_draft_tokens += drafted
            self._stats.spec_decode_num_accepted_tokens += count - 1
        self.admission.register(sequence, len(sequence.tokens) - 1, self._epoch)
        if result.ended or sequence.answered >= sequence.limit:
            self.admission.lengths.ended(sequence.answered, sequence.limit)
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        if sequence.state not in ("waiting", "ended"):
            self.running.remove(sequence)
        self.admission.release(sequence)
        sequence.state = "ended"
        self._sequences.pop(sequence.number, None)
        self._deadlines.pop(sequence.number, None)
        answers = self._requests.get(sequence.spec.request_id, [])
        if sequence in answers:
            answers.remove(sequence)
        if not answers:
            self._requests.pop(sequence.spec.request_id, None)


def _age(sequence: Sequence) -> tuple[int, int, int]:
    """Return the order of sequences from the one that matters most."""
    return sequence.spec.priority, sequence.arrival, sequence.index


def _kind(plan: Plan) -> Kind:
    if isinstance(plan, Encode):
        return "encode"
    return "prefill" if isinstance(plan, Prefill) else "decode"


def _steps(plan: Plan) -> list[int]:
    """Return how many tokens each row draws, drafts that turn out to be right not counted."""
    return plan.steps.tolist() if isinstance(plan, Decode) else [1] * len(plan.rows)


def _length(plan: Plan) -> int:
    return plan.length if isinstance(plan, Decode) else 1
