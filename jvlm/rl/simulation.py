"""How long rollouts take under each way to schedule them, on a clock that is not real: no model, no device.

Devices decode rows together: a step of ``live`` rows takes ``step_seconds + row_seconds * live``. Lengths are
log-normal between prompts and between the answers to one. What decides which groups are started, and which a step
trains on, is `jvlm.rl.selection.Selection`, the code that a run uses. ``python -m jvlm.rl.simulation`` prints the table
beside that of MiMo (arXiv 2505.07608).
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jvlm.rl.selection import Selection, SelectionConfig

Schedule = Literal["naive", "plain", "continuous", "async", "early"]
SCHEDULES: tuple[Schedule, ...] = ("plain", "naive", "continuous", "async", "early")
# MiMo's table: speed of a whole step, speed of its rollouts, idle time, idle share, share of groups not needed
PAPER: dict[str, tuple[float, float, float, float, float]] = {
    "plain": (2.45, 2.82, 0.36, 0.708, math.nan),
    "naive": (1.00, 1.00, 1.00, 0.693, 0.221),
    "continuous": (1.99, 2.20, 0.25, 0.388, 0.139),
    "async": (2.09, 2.34, 0.21, 0.340, 0.164),
    "early": (2.29, 2.61, 0.15, 0.277, 0.129),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is simulated; the defaults are fitted to MiMo's table.

    Attributes:
      groups: of answers that a step trains on.
      answers: of a group.
      devices: that decode.
      slots: rows that a device decodes together.
      step_seconds, row_seconds: of a decode step, and of each row in it.
      log_length: mean of the logarithm of an answer's tokens.
      prompt_spread, answer_spread: standard deviation of it between prompts, and between the answers of one.
      longest: tokens of an answer.
      perfect_share, hopeless_share: of prompts whose answers are all right, or all wrong: no step trains on those.
      perfect_length, hopeless_length: their lengths relative to others.
      reward_seconds: of a group.
      train_share: time of training relative to a naive rollout.
      prior_groups, prior_share: what is expected of prompts before any is judged.
      margin: groups that are started above what is likely to be needed.
    """

    groups: int = 512
    answers: int = 16
    devices: int = 256
    slots: int = 16
    step_seconds: float = 0.012
    row_seconds: float = 0.0002
    log_length: float = 6.85
    prompt_spread: float = 0.9
    answer_spread: float = 0.75
    longest: int = 32768
    perfect_share: float = 0.37
    hopeless_share: float = 0.2
    perfect_length: float = 0.745
    hopeless_length: float = 1.5
    reward_seconds: float = 0.1
    train_share: float = 0.095
    prior_groups: float = 2048
    prior_share: float = 0.52
    margin: float = 0.15


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a rollout took.

    Attributes:
      seconds: from the first token to the last reward that is needed.
      idle: share of the devices' time without a row.
      waste: share of the started groups that were not needed.
      started: groups.
      reward_wait: seconds in which nothing but rewards was waited for.
    """

    seconds: float
    idle: float
    waste: float
    started: int
    reward_wait: float


class Prompts:
    """Groups by serial number, the same in every schedule: whether they are useful, and how long their answers."""

    def __init__(self, workload: Workload, seed: int):
        self._workload, self._seed = workload, seed
        self._known: dict[int, tuple[bool, list[int]]] = {}

    def __call__(self, serial: int) -> tuple[bool, list[int]]:
        """Return whether a step can train on a group, and the tokens of each of its answers."""
        if serial not in self._known:
            w, draw = self._workload, np.random.default_rng((self._seed, serial))
            kind, common = draw.random(), draw.normal(w.log_length, w.prompt_spread)
            perfect, hopeless = kind < w.perfect_share, kind >= 1 - w.hopeless_share
            factor = w.perfect_length if perfect else w.hopeless_length if hopeless else 1.0
            tokens = np.exp(common + draw.normal(0, w.answer_spread, w.answers)) * factor
            lengths = np.clip(np.ceil(tokens), 1, w.longest).astype(int).tolist()
            self._known[serial] = (not (perfect or hopeless), lengths)
        return self._known[serial]


class _Device:
    """Rows that share a device; all of them come forward together."""

    def __init__(self, workload: Workload):
        self._workload = workload
        self.waiting: deque[tuple[int, int]] = deque()  # (tokens, serial)
        self._live: list[tuple[float, int]] = []  # (tokens decoded by the device when it ends, serial)
        self._decoded, self._since, self.busy = 0.0, 0.0, 0.0
        self.version = 0  # of what is expected next; events of earlier ones are void

    @property
    def rows(self) -> int:
        """Rows that are decoded or wait."""
        return len(self._live) + len(self.waiting)

    def _seconds_a_token(self) -> float:
        return self._workload.step_seconds + self._workload.row_seconds * len(self._live)

    def advance(self, now: float) -> None:
        """Decode until now."""
        if self._live:
            self._decoded += (now - self._since) / self._seconds_a_token()
            self.busy += now - self._since
        self._since = now

    def fill(self) -> None:
        """Give waiting rows the free slots."""
        while self.waiting and len(self._live) < self._workload.slots:
            tokens, serial = self.waiting.popleft()
            heapq.heappush(self._live, (self._decoded + tokens, serial))
        self.version += 1

    def next_end(self) -> float | None:
        """Return when the first row ends."""
        if not self._live:
            return None
        return self._since + max(self._live[0][0] - self._decoded, 0.0) * self._seconds_a_token()

    def end_row(self) -> int:
        """Take out the row that ends first; returns its group."""
        return heapq.heappop(self._live)[1]


class _Clock:
    """Devices, rewards and the events of both."""

    def __init__(self, workload: Workload, prompts: Prompts, reward_servers: int | None):
        self.workload, self.prompts = workload, prompts
        self.devices = [_Device(workload) for _ in range(workload.devices)]
        self.now, self.reward_wait, self.judging = 0.0, 0.0, 0
        self._left: dict[int, int] = {}  # answers of a group that are not there yet
        self._events: list[tuple[float, int, int, int]] = []  # (time, device or -1, version, serial)
        self._free_at = None if reward_servers is None else [0.0] * reward_servers
        self._rows = 0

    @property
    def has_room(self) -> bool:
        """Whether a group finds free slots for all of its rows."""
        return self._rows + self.workload.answers <= self.workload.devices * self.workload.slots

    @property
    def has_events(self) -> bool:
        """Whether anything is decoded or judged."""
        return bool(self._rows or self.judging)

    def start(self, serial: int, devices: Sequence[int] | None = None) -> None:
        """Give a group's rows to devices, the emptiest ones if none are named."""
        lengths = self.prompts(serial)[1]
        self._left[serial] = len(lengths)
        self._rows += len(lengths)
        touched = set()
        if devices is None:
            loads = [(device.rows, n) for n, device in enumerate(self.devices)]
            heapq.heapify(loads)
            devices = []
            for _ in lengths:
                rows, n = loads[0]
                heapq.heapreplace(loads, (rows + 1, n))
                devices.append(n)
        for tokens, n in zip(lengths, devices, strict=True):
            self.devices[n].waiting.append((tokens, serial))
            touched.add(n)
        for n in touched:
            self.devices[n].advance(self.now)
            self._settle(n)

    def _settle(self, n: int) -> None:
        device = self.devices[n]
        device.fill()
        end = device.next_end()
        if end is not None:
            heapq.heappush(self._events, (end, n, device.version, -1))

    def step(self) -> int | None:
        """Go to the next event; returns the group that was judged, if it is one's reward."""
        time, n, version, serial = heapq.heappop(self._events)
        if n >= 0 and version != self.devices[n].version:
            return None
        if n < 0 and not self._rows:
            self.reward_wait += time - self.now
        self.now = time
        if n < 0:
            self.judging -= 1
            return serial
        device = self.devices[n]
        device.advance(time)
        done = device.end_row()
        self._left[done] -= 1
        self._rows -= 1
        self._settle(n)
        if not self._left[done]:
            self._judge(done)
        return None

    def _judge(self, serial: int) -> None:
        begin = self.now
        if self._free_at is not None:
            begin = max(begin, heapq.heappop(self._free_at))
            heapq.heappush(self._free_at, begin + self.workload.reward_seconds)
        self.judging += 1
        heapq.heappush(self._events, (begin + self.workload.reward_seconds, -1, 0, serial))

    def busy(self) -> float:
        """Return seconds with a row, of all devices together."""
        for device in self.devices:
            device.advance(self.now)
        return sum(device.busy for device in self.devices)


def rounds(workload: Workload, prompts: Prompts, *, most: int | None = None) -> Phase:
    """Return the phase of rounds of groups, each of which waits for its longest answer, until enough are useful.

    Args:
      most: rounds at most; a single one trains on whatever is useful.
    """
    w, useful, serial, clock = workload, 0, 0, _Clock(workload, prompts, None)
    started = 0
    while useful < w.groups and (most is None or started < most):
        started += 1
        for place in range(w.groups):
            rows = range(place * w.answers, (place + 1) * w.answers)
            clock.start(serial + place, [row % w.devices for row in rows])
        while clock.has_events:
            judged = clock.step()
            if judged is not None and prompts(judged)[0] and useful < w.groups:
                useful, needed = useful + 1, judged + 1
        serial += w.groups
    order = [n for n in range(serial) if prompts(n)[0]]
    needed = order[w.groups - 1] + 1 if len(order) >= w.groups else serial
    return _phase(clock, serial, needed)


def continuous(workload: Workload, prompts: Prompts, *, reward_servers: int | None, early: bool) -> Phase:
    """Return the phase of groups that start as soon as there is room, as `Selection` decides.

    Args:
      reward_servers: groups that are judged at a time; None for any number.
      early: whether the phase ends when the groups to train on are certain, and what still runs is given up.
    """
    w, clock = workload, _Clock(workload, prompts, reward_servers)
    config = SelectionConfig(w.groups, w.margin, prior_share=w.prior_share, prior_groups=w.prior_groups)
    selection = Selection(config, 0)
    while True:
        while clock.has_room and selection.wants_more(clock.judging):
            clock.start(selection.start())
        chosen = selection.selected()
        if chosen is not None and (early or not clock.has_events):
            return _phase(clock, selection.started, chosen[-1] + 1)
        judged = clock.step()
        if judged is not None:
            selection.judge(judged, prompts(judged)[0])


@dataclasses.dataclass(frozen=True)
class Stale:
    """What rollouts of several steps took whose groups may begin before the step that trains on them.

    Attributes:
      seconds: of a step's rollout, on average.
      idle: share of the devices' time without a row.
      age, oldest: steps between the start of a group and the training on it, on average and at most.
    """

    seconds: float
    idle: float
    age: float
    oldest: int


def stale(workload: Workload, prompts: Prompts, staleness: float, steps: int = 10, warm_up: int = 3) -> Stale:
    """Return what rollouts of several steps take if groups that are not trained on yet are kept, and more are started.

    As many are on the way as ``1 + staleness`` steps are likely to need. Each step trains on the useful groups with the
    lowest numbers; while it does, nothing is decoded. Rewards are judged any number at a time.

    Args:
      staleness: steps by which the weights of an answer may be behind, beside those of a group that takes long.
      warm_up: steps that are not counted, until as many groups are on the way as may.
    """
    w, clock = workload, _Clock(workload, prompts, None)
    judged: set[int] = set()
    begun: list[int] = []  # the step in which each group was started
    useful = behind = 0
    ages: list[int] = []
    began = busy = 0.0
    for step in range(steps):
        if step == warm_up:
            ages, began, busy = [], clock.now, clock.busy()
        chosen = _lowest(prompts, judged, behind, w.groups)
        while chosen is None:
            share = (w.prior_share * w.prior_groups + useful) / (w.prior_groups + len(judged))
            most = (1 + staleness) * (1 + w.margin) * w.groups / share
            while clock.has_room and (len(begun) - behind < most or not clock.has_events):
                clock.start(len(begun))
                begun.append(step)
            done = clock.step()
            if done is not None:
                judged.add(done)
                useful += prompts(done)[0]
                chosen = _lowest(prompts, judged, behind, w.groups)
        ages += [step - begun[serial] for serial in chosen]
        behind = chosen[-1] + 1
    seconds = clock.now - began
    idle = 1 - (clock.busy() - busy) / (w.devices * seconds)
    return Stale(seconds / (steps - warm_up), idle, statistics.fmean(ages), max(ages))


def _lowest(prompts: Prompts, judged: set[int], first: int, count: int) -> list[int] | None:
    """Return the useful groups with the lowest numbers; None while a lower one is not judged."""
    found, serial = [], first
    while len(found) < count:
        if serial not in judged:
            return None
        if prompts(serial)[0]:
            found.append(serial)
        serial += 1
    return found


def _phase(clock: _Clock, started: int, needed: int) -> Phase:
    share = clock.busy() / (clock.workload.devices * clock.now)
    return Phase(clock.now, 1 - share, 1 - needed / started, started, clock.reward_wait)


def simulate(schedule: Schedule, workload: Workload = Workload(), seed: int = 0) -> Phase:
    """Return the phase of a schedule.

    "naive" is rounds until enough groups are useful, "plain" a single round, "continuous" starts groups as there is
    room and has them judged one by one, "async" judges any number at a time, "early" also gives up what is not needed.
    """
    prompts = Prompts(workload, seed)
    match schedule:
        case "naive":
            return rounds(workload, prompts)
        case "plain":
            return rounds(workload, prompts, most=1)
        case _:
            servers = 1 if schedule == "continuous" else None
            return continuous(workload, prompts, reward_servers=servers, early=schedule == "early")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table, relative to the naive schedule on the same prompts.

    Attributes:
      overall: speed of a step with its training.
      rollout: speed of the rollout.
      norm_idle: idle time.
      idle, waste: as in `Phase`.
    """

    overall: float
    rollout: float
    norm_idle: float
    idle: float
    waste: float


def table(workload: Workload = Workload(), seeds: Sequence[int] = range(8)) -> dict[str, tuple[Row, Row]]:
    """Return the mean and the standard deviation over seeds of each schedule."""
    found: dict[str, list[Row]] = {schedule: [] for schedule in SCHEDULES}
    for seed in seeds:
        phases = {schedule: simulate(schedule, workload, seed) for schedule in SCHEDULES}
        naive = phases["naive"]
        train = workload.train_share * naive.seconds
        for schedule, phase in phases.items():
            row = Row(
                (naive.seconds + train) / (phase.seconds + train),
                naive.seconds / phase.seconds,
                phase.seconds * phase.idle / (naive.seconds * naive.idle),
                phase.idle,
                phase.waste,
            )
            found[schedule].append(row)
    return {
        schedule: (_over(rows, statistics.fmean), _over(rows, statistics.pstdev)) for schedule, rows in found.items()
    }


def _over(rows: Sequence[Row], function: Callable[[Sequence[float]], float]) -> Row:
    return Row(*(function(values) for values in zip(*map(dataclasses.astuple, rows), strict=True)))


def main(words: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Simulated rollouts beside the published table (arXiv 2505.07608).")
    parser.add_argument("--seeds", type=int, default=8, help="how many to average over")
    given = parser.parse_args(words)
    columns = [field.name for field in dataclasses.fields(Row)]
    print("| schedule | " + " | ".join(f"{name}: published / here" for name in columns) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    for schedule, (mean, deviation) in table(seeds=range(given.seeds)).items():
        cells = [
            f"{'-' if math.isnan(paper) else f'{paper:.3g}'} / {here:.3g} ± {spread:.2g}"
            for paper, here, spread in zip(
                PAPER[schedule], dataclasses.astuple(mean), dataclasses.astuple(deviation), strict=True
            )
        ]
        print(f"| {schedule} | " + " | ".join(cells) + " |")
    print("\n| steps behind | overall | rollout | idle | age | oldest |\n| --- | --- | --- | --- | --- | --- |")
    for staleness, row in stale_table(seeds=range(given.seeds)).items():
        print(f"| {staleness:g} | " + " | ".join(f"{value:.3g}" for value in row) + " |")
    return 0


def stale_table(
    workload: Workload = Workload(), seeds: Sequence[int] = range(8), behind: Sequence[float] = (0.0, 0.5, 1.0, 2.0)
) -> dict[float, tuple[float, ...]]:
    """Return (speed of a step, of its rollout, idle share, mean age, oldest) for steps that answers may be behind.

    Speeds are relative to the naive schedule; the mean over seeds, of the oldest the most.
    """
    found: dict[float, list[tuple[float, ...]]] = {staleness: [] for staleness in behind}
    for seed in seeds:
        prompts = Prompts(workload, seed)
        naive = rounds(workload, prompts).seconds
        train = workload.train_share * naive
        for staleness, rows in found.items():
            one = stale(workload, prompts, staleness)
            overall = (naive + train) / (one.seconds + train)
            rows.append((overall, naive / one.seconds, one.idle, one.age, one.oldest))
    return {
        staleness: (
            *(statistics.fmean(column) for column in list(zip(*rows, strict=True))[:-1]),
            max(r[-1] for r in rows),
        )
        for staleness, rows in found.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
