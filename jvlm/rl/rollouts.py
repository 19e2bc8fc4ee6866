"""Rollouts of one step: groups of answers are started as they are likely to be needed, judged beside, and selected.

What is selected is a function of weights, prompts and serial numbers alone: how long anything takes decides only how
many groups are started in vain.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.inference.requests import Event, Request, SamplingParams
from jvlm.rl.advantages import EQUAL
from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.journal import Journal
from jvlm.rl.prompt_stream import Outcome, Prompt, PromptStream
from jvlm.rl.prompts import EncodedPrompt
from jvlm.rl.records import AnswerRecord, GroupRecord
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.selection import Selection, SelectionConfig
from jvlm.scoring.score import Score

_AHEAD = 4  # prompts that are decoded before they are asked


class SamplingEngine(Protocol):
    """What of `jvlm.inference.engine.Engine` rollouts use."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Event]: ...

    def abort(self, request_id: str) -> None: ...

    @property
    def has_work(self) -> bool: ...


class Judge(Protocol):
    """What of a source of rewards rollouts use."""

    def scores(self, items: Sequence[RewardItem]) -> list[Score]: ...


@dataclasses.dataclass
class Timing:
    """Seconds and counts of a rollout.

    Attributes:
      seconds: from the first prompt to the selection.
      busy: with an answer in the engine.
      reward_wait: in which nothing but rewards was waited for.
      slot_steps, live_steps: slots that were there, and that had an answer with a first token, over all steps that
        gave tokens.
      started, judged, reused: groups; the last are from the journal.
      needed: groups up to the last that was selected.
      tokens: drawn.
    """

    seconds: float = 0.0
    busy: float = 0.0
    reward_wait: float = 0.0
    slot_steps: int = 0
    live_steps: int = 0
    started: int = 0
    judged: int = 0
    reused: int = 0
    needed: int = 0
    tokens: int = 0


class Rollout(NamedTuple):
    """What a step's rollout gave.

    Attributes:
      selected: groups to train on, by serial number, each with its prompt.
      judged: all groups up to the last of them.
      kept: groups behind it that go on in the next step.
      outcomes: of these, for `PromptStream.finish_step`.
      items: what was asked in these, without an answer, by serial number.
      last: serial number of the last of them.
      lacking: of these, how many had a missing reward.
      fresh: of these, how many had to be drawn, and were not in the journal.
    """

    selected: list[tuple[GroupRecord, EncodedPrompt]]
    judged: list[GroupRecord]
    outcomes: dict[int, Outcome]
    items: dict[int, RewardItem]
    last: int
    lacking: int
    kept: int
    fresh: int
    timing: Timing


class _Running:
    """A group whose answers are drawn."""

    def __init__(self, prompt: Prompt, encoded: EncodedPrompt, count: int):
        self.prompt, self.encoded = prompt, encoded
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.log_probs: list[list[float]] = [[] for _ in range(count)]
        self.entropies: list[list[float]] = [[] for _ in range(count)]
        self.versions: list[list[int]] = [[] for _ in range(count)]
        self.texts: list[str] = [""] * count
        self.finished: list[str] = [""] * count

    @property
    def left(self) -> int:
        return self.finished.count("")

    def answers(self) -> tuple[AnswerRecord, ...]:
        parts = (self.tokens, self.log_probs, self.entropies, self.versions)
        lists = [tuple(map(tuple, part)) for part in parts]
        return tuple(AnswerRecord(*one) for one in zip(*lists, self.texts, self.finished, strict=True))


@dataclasses.dataclass
class _Going:
    """Groups that are not trained on yet: drawn, judged beside, judged; and their prompts."""

    running: dict[int, _Running] = dataclasses.field(default_factory=dict)
    judging: dict[Future[list[Score]], tuple[_Running, float]] = dataclasses.field(default_factory=dict)
    judged: dict[int, GroupRecord] = dataclasses.field(default_factory=dict)
    prompts: dict[int, EncodedPrompt] = dataclasses.field(default_factory=dict)

    def behind(self, last: int) -> _Going:
        """Return the groups behind one."""

        def later(values: dict) -> dict:
            return {serial: value for serial, value in values.items() if serial > last}

        return _Going(later(self.running), dict(self.judging), later(self.judged), later(self.prompts))

    @property
    def serials(self) -> list[int]:
        """Their numbers, in order."""
        asked = (group.prompt.serial for group, _ in self.judging.values())
        return sorted({*self.running, *self.judged, *asked})


class Rollouts:
    """Makes the groups of steps. With `SelectionConfig.ahead` groups of later steps go on from one to the next.

    Args:
      engine: draws answers; its log-probabilities must be those of the distribution drawn from.
      encode: returns the prompt of an example by its number; raises ExampleError for one that cannot be asked.
      judge: gives the rewards, called in threads.
      seed: of all draws of the run.
      slots: answers that are drawn together; None is those of one engine.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        encode: Callable[[int], EncodedPrompt],
        judge: Judge,
        journal: Journal,
        rollout: RolloutConfig,
        rewards: RewardConfig,
        *,
        seed: int,
        slots: int | None = None,
    ):
        self.engine, self.encode, self._judge, self.journal = engine, encode, judge, journal
        self.slots = slots or rollout.slots
        self.config, self._rewards, self._seed = rollout, rewards, seed
        self._judges = ThreadPoolExecutor(rewards.workers, "rewards")
        self._readers = ThreadPoolExecutor(2, "prompts")
        self._going = _Going()
        self._meanwhile: list[tuple[int, Event]] = []  # between two steps: version of the weights, and what was drawn
        self._version, self._behind = 0, False

    @property
    def goes_on(self) -> bool:
        """Whether answers of later steps are in the engine, which must keep its cache."""
        return bool(self._going.running)

    def close(self) -> None:
        """Give up what goes on, and stop the threads."""
        for serial in self._going.running:
            self.engine.abort(str(serial))
        self._going, self._meanwhile = _Going(), []
        self._judges.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def run(
        self,
        stream: PromptStream,
        selection: SelectionConfig,
        rate: tuple[int, int],
        version: int,
        made_with: Mapping[str, Any],
    ) -> Rollout:
        """Return the groups of a step.

        Args:
          rate: groups judged in earlier steps, and how many of them were useful.
          version: optimizer steps behind the weights.
          made_with: what decides the answers, for the journal.

        Raises:
          UserError: no group is useful; the rewards may not be used at all; weights that are not finite.
        """
        going, self._going = self._going, _Going()
        step = _Step(self, stream, Selection(selection, stream.serial, rate), version, made_with, going)
        meanwhile, self._meanwhile = self._meanwhile, []
        try:
            for drawn_by, event in meanwhile:
                step.take(event, drawn_by)
            step.behind &= bool(step.running)
            rollout = step.run()
            self._version, self._behind = version, step.behind
            if selection.ahead:
                self._going = step.keep(rollout.last)
            return rollout
        finally:
            step.end()

    def go_on_until(self, is_done: Callable[[], bool]) -> None:
        """Draw further tokens of the groups of later steps, while a step trains that leaves the engine its parameters.

        Args:
          is_done: whether that step has ended.
        """
        while self.goes_on and self.engine.has_work and not is_done():
            version, self._behind = self._version - self._behind, False
            self._meanwhile += [(version, event) for event in self.engine.step()]

    def sampling(self, serial: int) -> SamplingParams:
        """Return how the answers of a group are drawn: each token by run, group, answer and its number alone."""
        config = self.config
        per_seed = 2**31 // config.answers  # numbers of answers are 31 bits
        return SamplingParams(
            temperature=config.temperature,
            seed=(self._seed + serial // per_seed) % 2**32,
            number=serial % per_seed * config.answers,
            n=config.answers,
            max_tokens=config.max_tokens,
            logprobs=0,
            stream=False,
        )


class _Step:
    def __init__(
        self,
        owner: Rollouts,
        stream: PromptStream,
        selection: Selection,
        version: int,
        made_with: Mapping[str, Any],
        going: _Going,
    ):
        self.owner, self.stream, self.selection, self.version = owner, stream, selection, version
        self.known = owner.journal.begin(version, made_with)
        self.running, self.judging, self.prompts = going.running, going.judging, going.prompts
        self.reading: dict[int, Future[EncodedPrompt]] = {}
        self.judged: dict[int, GroupRecord] = {}
        self.timing = Timing()
        # an engine that runs ahead tells in its next step what the weights before have drawn
        self.behind = bool(self.running) and bool(getattr(owner.engine, "ahead", False))
        for _ in going.serials:
            self.selection.start()
        for serial in sorted(going.judged):
            self._note(going.judged[serial], is_new=serial not in self.known)

    # -- the loop

    def run(self) -> Rollout:
        began = time.perf_counter()
        while (chosen := self.selection.selected()) is None:
            turn = time.perf_counter()
            self._start()
            if self.owner.engine.has_work:
                self._decode()
                self.timing.busy += time.perf_counter() - turn
            turn, goes_on = time.perf_counter(), self.owner.engine.has_work
            self._take_rewards(must_wait=not goes_on)
            if goes_on:
                self.timing.busy += time.perf_counter() - turn
        self.timing.seconds = time.perf_counter() - began
        return self._result(chosen)

    def keep(self, last: int) -> _Going:
        """Return the groups behind one, which are not given up."""
        going = _Going(self.running, self.judging, self.judged, self.prompts).behind(last)
        self.running, self.judging = {}, {}
        return going

    def end(self) -> None:
        """Give up what is not needed any more."""
        for serial in self.running:
            self.owner.engine.abort(str(serial))
        while self.owner.engine.has_work and not self.owner.goes_on:
            self.owner.engine.step()
        for future in (*self.judging, *self.reading.values()):
            future.cancel()
        self.owner.journal.close()

    def _start(self) -> None:
        """Start groups while they are wanted and slots are free."""
        config = self.owner.config
        while self._live() < self.owner.slots and self.selection.wants_more(len(self.judging)):
            serial = self.selection.start()
            self.timing.started += 1
            prompt = self.stream.prompt(serial)
            try:
                encoded = self._read(serial).result()
            except ExampleError as error:
                self._note(self._without_answers(prompt, error))
                continue
            self.prompts[serial] = encoded
            if serial in self.known:
                self.timing.reused += 1
                self._note(self.known[serial], is_new=False)
                continue
            self.running[serial] = _Running(prompt, encoded, config.answers)
            self.owner.engine.submit(Request(str(serial), encoded.example, self.owner.sampling(serial)))

    def _read(self, serial: int) -> Future[EncodedPrompt]:
        """Return the prompt of a group to come; the next ones are read meanwhile."""
        for ahead in range(serial, serial + 1 + _AHEAD):
            if ahead not in self.reading:
                try:
                    example = self.stream.prompt(ahead).example
                except UserError:
                    if ahead == serial:
                        raise
                    break  # told when it is asked for
                self.reading[ahead] = self.owner._readers.submit(self.owner.encode, example)
        return self.reading.pop(serial)

    def _live(self) -> int:
        return sum(group.left for group in self.running.values())

    def _decode(self) -> None:
        drawn = self.timing.tokens
        live = sum(group.left for group in self.running.values() if any(group.tokens))
        version, self.behind = self.version - self.behind, False
        for event in self.owner.engine.step():
            self.take(event, version)
        if self.timing.tokens > drawn:
            self.timing.slot_steps += self.owner.slots
            self.timing.live_steps += min(live, self.owner.slots)

    def take(self, event: Event, version: int) -> None:
        """Note what the weights of a version have drawn."""
        group = self.running.get(int(event.request_id))
        if group is None or event.finish_reason == "abort":
            return
        if event.finish_reason == "error":
            raise event.error or UserError(f"the engine gave no answer to group {event.request_id}")
        if event.token is not None:
            assert event.logprob is not None
            group.tokens[event.index].append(event.token)
            group.log_probs[event.index].append(event.logprob.logprob)
            group.entropies[event.index].append(event.logprob.entropy or 0.0)
            group.versions[event.index].append(version)
            self.timing.tokens += 1
        group.texts[event.index] += event.text
        group.finished[event.index] = event.finish_reason or ""
        if event.finish_reason is not None and not group.left:
            del self.running[group.prompt.serial]
            self._judge(group)

    # -- rewards

    def _judge(self, group: _Running) -> None:
        item = group.encoded.item
        items = [
            dataclasses.replace(
                item,
                id=f"{item.id}, group {group.prompt.serial}, answer {number}",
                answer=answer.text,
                truncated=answer.truncated,
                token_ids=answer.tokens,
            )
            for number, answer in enumerate(group.answers())
        ]
        future = self.owner._judges.submit(self.owner._judge.scores, items)
        self.judging[future] = group, time.perf_counter()

    def _take_rewards(self, *, must_wait: bool) -> None:
        """Note groups whose rewards are there; wait for one where there is nothing else to do."""
        if not self.judging:
            return
        began = time.perf_counter()
        done, _ = wait(self.judging, None if must_wait else 0, FIRST_COMPLETED)
        if must_wait:
            self.timing.reward_wait += time.perf_counter() - began
        for future in done:
            group, asked = self.judging.pop(future)
            scores = future.result()
            if len(scores) != self.owner.config.answers:
                raise UserError(f"{len(scores)} rewards came for the {self.owner.config.answers} answers of a group")
            self._note(self._record(group, scores, time.perf_counter() - asked))

    def _record(self, group: _Running, scores: Sequence[Score], seconds: float) -> GroupRecord:
        answers = tuple(
            dataclasses.replace(answer, reward=score.value, reason=score.reason, parsed=score.parsed)
            for answer, score in zip(group.answers(), scores, strict=True)
        )
        prompt, encoded = group.prompt, group.encoded
        return GroupRecord(
            prompt.serial,
            prompt.example,
            str(encoded.example.origin),
            encoded.item.task,
            self.version,
            prompt.from_pool,
            encoded.example.length,
            answers,
            judge_seconds=seconds,
        )

    def _without_answers(self, prompt: Prompt, error: ExampleError) -> GroupRecord:
        where = (prompt.serial, prompt.example, str(error.origin), "", self.version, prompt.from_pool, 0)
        return GroupRecord(*where, (), problem=str(error))

    def _note(self, group: GroupRecord, *, is_new: bool = True) -> None:
        if is_new:
            # as it is read again after a restart
            group = GroupRecord.of_line(self.owner.journal.add(group))
        self.judged[group.serial] = group
        self.timing.judged += 1
        self.selection.judge(group.serial, is_useful(group))

    def _result(self, chosen: Sequence[int]) -> Rollout:
        wanted = self.selection.config.groups
        first = self.stream.serial
        last = chosen[-1] if len(chosen) == wanted else first + self.selection.started - 1
        judged = [self.judged[serial] for serial in range(first, last + 1)]
        self.timing.needed = len(judged)
        perfect = self.owner._rewards.perfect
        outcomes = {group.serial: outcome_of(group, perfect.get(group.task, 1.0)) for group in judged}
        selected = [(self.judged[serial], self.prompts[serial]) for serial in chosen]
        lacking = sum(any(reward is None for reward in group.rewards) for group in judged)
        items = {serial: self.prompts[serial].item for serial in range(first, last + 1) if serial in self.prompts}
        kept = first + self.selection.started - 1 - last if self.selection.config.ahead else 0
        fresh = sum(bool(group.answers) and group.serial not in self.known for group in judged)
        return Rollout(selected, judged, outcomes, items, last, lacking, kept, fresh, self.timing)


def is_useful(group: GroupRecord) -> bool:
    """Return whether a group's raw rewards, those that are there, differ."""
    rewards = [reward for reward in group.rewards if reward is not None]
    return len(rewards) >= 2 and max(rewards) - min(rewards) > EQUAL


def outcome_of(group: GroupRecord, perfect: float) -> Outcome:
    """Return what becomes of the prompt of a group. Without all rewards nothing does.

    Args:
      perfect: least reward of an answer that cannot be better.
    """
    rewards = [reward for reward in group.rewards if reward is not None]
    if not rewards or len(rewards) < len(group.rewards):
        return Outcome()
    return Outcome(perfect=min(rewards) >= perfect, hopeless=max(rewards) <= 0)
