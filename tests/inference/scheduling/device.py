"""A device that executes plans on plain lists: what each place of the cache holds is the token, position and picture.

The next token is a hash of everything that a sequence can see, so that one wrong place changes all tokens after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from jvlm.inference.scheduling.config import SchedulerConfig
from jvlm.inference.scheduling.plans import ON_DEVICE, Decode, Encode, Plan, Prefill, Result, Row
from jvlm.inference.scheduling.scheduler import Scheduler
from jvlm.inference.scheduling.sequence_spec import Media, SequenceSpec

# Few tokens, so that drafts are right now and then.
END, IMAGE = 5, 6

Place = tuple[int, tuple[int, ...], bytes]


def picture(name: str, tokens: int, patches: int | None = None) -> tuple[bytes, int, int]:
    return hashlib.sha256(name.encode()).digest(), tokens, 4 * tokens if patches is None else patches


def spec(request_id: str, parts: list, **fields) -> SequenceSpec:
    """A prompt of token ids and `picture`s; a picture's positions lie on a grid of one row below another."""
    tokens, positions, index, media, fed, after = [], [], [], [], 0, 0
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
            positions.append((after,) * 3)
            index.append(-1)
            after += 1
            continue
        content, count, patches = part
        media.append(Media(content, fed, count, 0, patches))
        width = max(int(count**0.5), 1)
        tokens += [IMAGE] * count
        positions += [(after, after + i // width, after + i % width) for i in range(count)]
        index += range(fed, fed + count)
        fed, after = fed + count, max(max(p) for p in positions) + 1
    arrays = np.array(tokens, np.int32), np.array(positions, np.int32).reshape(-1, 3), np.array(index, np.int32)
    return SequenceSpec(request_id, *arrays, tuple(media), **fields)


def draw(places: list[Place], seed: str, number: int) -> int:
    """The token after what stands in these places."""
    digest = hashlib.blake2b(repr((places, seed, number)).encode(), digest_size=4).digest()
    value = int.from_bytes(digest, "little") % 30
    return END if not value else value % END


def places_of(prompt: SequenceSpec) -> list[Place]:
    """What a right cache holds of a prompt; of a picture the content and which of its vision tokens."""
    found = []
    for token, position, index in zip(prompt.tokens, prompt.positions, prompt.vision_index, strict=True):
        feature = b""
        for media in prompt.media:
            if media.first <= index < media.first + media.tokens:
                feature = media.content + int(index - media.first).to_bytes(4, "little")
        found.append((int(token), tuple(position.tolist()), feature))
    return found


def alone(prompt: SequenceSpec, index: int, limit: int) -> list[int]:
    """The answer to a request that nothing runs beside, without any cache."""
    places, tokens = places_of(prompt), []
    after = int(prompt.positions.max()) + 1
    while len(tokens) < limit:
        tokens.append(draw(places, f"{prompt.request_id}/{index}", len(tokens)))
        if tokens[-1] == END:
            break
        places.append((tokens[-1], (after,) * 3, b""))
        after += 1
    return tokens


@dataclasses.dataclass
class Sent:
    """What a request's answer has been given so far."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


class Device:
    """Executes plans at once, and hands their results to the scheduler ``lag`` plans later.

    Args:
      seconds: that a plan takes; ``clock`` is the sum of them.
    """

    def __init__(self, config: SchedulerConfig, lag: int = 0, seconds: Callable[[Plan], float] = lambda plan: 0.001):
        self.config, self.lag, self.scheduler = config, lag, Scheduler(config)
        self.seconds, self.clock = seconds, 0.0
        self.cache: list[list[Place | None]] = [[None] * config.page_size for _ in range(config.num_pages)]
        self.pool: list[bytes | None] = [None] * config.feature_slots
        self.last = [0] * config.max_slots
        self.specs: dict[str, SequenceSpec] = {}
        self.sent: dict[tuple[str, int], Sent] = {}
        self.limits: dict[str, int] = {}
        self.waiting: list[tuple[Plan, dict[int, list[int]]]] = []
        self.encoded = self.computed = self.steps = 0
        self.plans: list[Plan] = []

    def add(self, prompt: SequenceSpec) -> None:
        self.limits[prompt.request_id] = self.scheduler.add(prompt)
        self.specs[prompt.request_id] = prompt
        self.sent |= {(prompt.request_id, i): Sent() for i in range(prompt.n)}

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def step(self) -> bool:
        """Plan and execute one step, and read what is late enough. Returns whether anything was left to do."""
        plan = self.scheduler.next()
        if plan is not None:
            self.plans.append(plan)
            self.waiting.append((plan, self._execute(plan)))
        while self.waiting and (plan is None or len(self.waiting) > self.lag):
            self._read(*self.waiting.pop(0))
            if plan is None:
                break
        return plan is not None or bool(self.waiting)

    def run(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not self.step() and not self.scheduler.has_work:
                return
        raise AssertionError(f"there is work left after {most} steps")

    def _execute(self, plan: Plan) -> dict[int, list[int]]:
        if isinstance(plan, Encode):
            for item in plan.pictures:
                media = self.specs[item.request_id].media[item.number]
                for i, slot in enumerate(item.feature_slots):
                    self.pool[slot] = media.content + i.to_bytes(4, "little")
                self.encoded += 1
            assert sum(item.patches for item in plan.pictures) <= self.config.encode_patches
            return {}
        return self._prefill(plan) if isinstance(plan, Prefill) else self._decode(plan)

    def _prefill(self, plan: Prefill) -> dict[int, list[int]]:
        drawn = {}
        assert sum(len(c.tokens) for c in plan.chunks) <= self.config.most_prefill_tokens
        past = self.config.prefill_past_pages
        assert past is None or sum(c.start // self.config.page_size for c in plan.chunks) <= past
        for chunk in plan.chunks:
            self.computed += len(chunk.tokens)
            assert chunk.start % self.config.page_size == 0
            for i, token in enumerate(chunk.tokens.tolist()):
                slot = chunk.feature_index[i]
                feature = b"" if slot < 0 else self.pool[slot]
                self._write(chunk.table, chunk.start + i, (token, tuple(chunk.positions[i].tolist()), feature))
            places = self._places(chunk.table, chunk.stop)
            self._check(chunk.row, places)
            for row in chunk.samples:
                drawn[row.sequence] = [self._draw(row, places, row.draw)]
                self.last[row.slot] = drawn[row.sequence][0]
        return drawn

    def _decode(self, plan: Decode) -> dict[int, list[int]]:
        contents = [list(self.cache[page]) for page, _ in plan.copies]
        for (_, page), content in zip(plan.copies, contents, strict=True):
            self.cache[page] = content
        drawn = {}
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        for i, row in enumerate(plan.rows):
            assert row.slot == plan.slots[i]
            tokens, start = plan.tokens[i, : 1 + plan.drafted[i]].tolist(), int(plan.starts[i])
            if tokens[0] == ON_DEVICE:
                tokens[0] = self.last[row.slot]
            assert row.draw == plan.draws[i]
            assert plan.steps[i] == 1 or not plan.drafted.any()
            self.steps = max(self.steps, int(plan.steps[i]))
            for k, token in enumerate(tokens):
                self._write(plan.tables[i], start + k, (token, (int(plan.positions[i]) + k,) * 3, b""))
            drawn[row.sequence] = []
            for k in range(len(tokens)):
                places = self._places(plan.tables[i], start + k + 1)
                if not k:
                    self._check(row, places)
                drawn[row.sequence].append(self._draw(row, places, row.draw + k))
                if drawn[row.sequence][-1] == END or k + 1 == len(tokens) or drawn[row.sequence][-1] != tokens[k + 1]:
                    break
            for k in range(1, int(plan.steps[i])):  # on after an end too: the device does not know of it
                token = drawn[row.sequence][-1]
                self._write(plan.tables[i], start + k, (token, (int(plan.positions[i]) + k,) * 3, b""))
                places = self._places(plan.tables[i], start + k + 1)
                drawn[row.sequence].append(self._draw(row, places, row.draw + k))
            self.last[row.slot] = drawn[row.sequence][-1]
        return drawn

    def _read(self, plan: Plan, drawn: dict[int, list[int]]) -> None:
        results = {}
        for row in plan.rows:
            if not self.scheduler.is_current(row):
                continue
            tokens = drawn[row.sequence]
            tokens = tokens[: tokens.index(END) + 1] if END in tokens else tokens
            sent = self.sent[row.request_id, row.index]
            assert not sent.ended
            assert row.draw == len(sent.tokens), "a token is sent twice, or one is left out"
            sent.tokens += tokens
            sent.ended = tokens[-1] == END or len(sent.tokens) == self.limits[row.request_id]
            results[row.sequence] = Result(tuple(tokens), tokens[-1] == END)
        self.clock += self.seconds(plan)
        self.scheduler.finish(plan, results, self.seconds(plan))

    def _draw(self, row: Row, places: list[Place], number: int) -> int:
        return draw(places, f"{row.request_id}/{row.index}", number)

    def _write(self, table: np.ndarray, place: int, value: Place) -> None:
        page = int(table[place // self.config.page_size])
        assert page, "a sequence writes to page 0"
        self.cache[page][place % self.config.page_size] = value

    def _places(self, table: np.ndarray, length: int) -> list[Place]:
        size = self.config.page_size
        return [self.cache[int(table[i // size])][i % size] for i in range(length)]

    def _check(self, row: Row, places: list[Place]) -> None:
        prompt = places_of(self.specs[row.request_id])
        assert places[: len(prompt)] == prompt[: len(places)], f"{row.request_id} reads what is not its prompt"


def audit(scheduler: Scheduler) -> None:
    """Check that pages, feature slots and slots are conserved, and that nobody shares what must not be shared."""
    running, pages, features = scheduler.running, scheduler.admission.pages, scheduler.admission.features
    holders: dict[int, int] = {}
    for sequence in running:
        assert len(set(sequence.pages)) == len(sequence.pages)
        assert 0 not in sequence.pages
        for page in sequence.pages:
            holders[page] = holders.get(page, 0) + 1
    for page in range(pages.num_pages):
        assert pages.references(page) == holders.get(page, 0)
    assert len(holders) + pages.free + pages.cached == pages.num_pages - 1
    slots = [s.slot for s in running]
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < scheduler.config.max_slots for slot in slots)
    held: dict[bytes, int] = {}
    for sequence in running:
        for key in sequence.held:
            held[key] = held.get(key, 0) + 1
    taken = [slot for key in held for slot in features[key].slots.tolist()]
    assert len(set(taken)) == len(taken)
    assert all(features[key].users == count for key, count in held.items())
    assert len(taken) + features.cached + features.free == features.num_slots
