"""The hook that feeds the trainer with rollouts of its own weights, and remembers where they are."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jaxtyping import Int

from jvlm.data.packing import Example
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.requests import SamplingParams
from jvlm.models import vlm
from jvlm.parallel import hosts
from jvlm.parallel.data_shards import local_sequences
from jvlm.rl.log_probs import banned_ids
from jvlm.rl.meshes import EnginePlace
from jvlm.rl.old_log_probs import OldLogProbs, answers_of
from jvlm.rl.packing import SampledAnswer, SampledGroup, Shape, packed_answers
from jvlm.rl.prompt_stream import PromptStream
from jvlm.rl.records import GroupRecord, with_training
from jvlm.rl.rewards.shortage import Shortage
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollouts import Rollout, Rollouts, is_useful
from jvlm.rl.shared_engine import RemoteEngine, SharedEngine, roll_out
from jvlm.rl.task import AnswerSequences, PolicyTask
from jvlm.rl.weighing import Weighed, weigh
from jvlm.training.hooks import Hook, StepResult
from jvlm.weights.fingerprints import fingerprints

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


_MOST_VAIN = 10  # rollouts in a row without a useful group


class PolicyLoop(Hook):
    """Before each step: rolls out with the trainer's weights, without a copy, and hands it the packed answers.

    It is also the iterator of the trainer's batches, so that the state of prompts and rates is the position in the data
    which checkpoints keep.

    Args:
      place: of the engine's parameters.
      prompts: how many there are.
      shape: of a micro-batch.
      settings: what decides answers and rewards beside the weights, for the journal.
      keep: steps before the present one whose journal is kept.
      engines: of several processes, of which ``engine`` is this one's.

    Attributes:
      groups: of the present step, those that it trains on first; for whoever writes them down.
      items: what was asked in them, without an answer, by serial number.
    """

    def __init__(
        self,
        task: PolicyTask,
        engine: Engine,
        place: EnginePlace,
        rollouts: Rollouts,
        prompts: int,
        shape: Shape,
        *,
        seed: int,
        settings: Mapping[str, Any],
        keep: int,
        engines: SharedEngine | RemoteEngine | None = None,
    ):
        self.task, self.engine, self.place, self.rollouts, self.shape = task, engine, place, rollouts, shape
        self.stream = PromptStream(prompts, seed, task.prompts)
        self.rate = 0, 0
        self.groups: list[GroupRecord] = []
        self.items: dict[int, RewardItem] = {}
        self._prompts, self._seed, self._settings, self._keep = prompts, seed, dict(settings), keep
        self._banned = banned_of(engine)
        self._old = OldLogProbs(task)
        self._engines = engines
        self._queue: collections.deque[AnswerSequences] = collections.deque()
        self._updates: collections.deque[list[AnswerSequences]] = collections.deque()  # to come of this rollout
        self._groups: list[list[GroupRecord]] = []  # of these updates
        self._vain: list[GroupRecord] = []  # of rollouts that had nothing to train on
        self._begun: dict[str, Any] = {}  # the state that this rollout began with
        self._behind = 0  # updates of it that were done
        self._shortage = Shortage()
        self._values: dict[str, float] = {}

    # -- the batches of the trainer

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnswerSequences:
        return self._queue.popleft()

    def get_state(self) -> list[dict[str, Any]]:
        """Return what the next rollout goes on from; one value, as of one process."""
        if self._updates:
            return [{**self._begun, "updates": self._behind}]
        return [{"prompts": self.stream.state(), "rate": list(self.rate)}]

    def set_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a `get_state`."""
        self.stream = PromptStream(self._prompts, self._seed, self.task.prompts, state[0]["prompts"])
        judged, useful = state[0]["rate"]
        self.rate, self._behind = (judged, useful), state[0].get("updates", 0)
        self._begun = dict(state[0])
        self._updates.clear()

    # -- steps

    def on_step_start(self, trainer: Trainer) -> None:
        """Roll out and pack, or take the next update of the present rollout."""
        if not self._updates:
            self._roll_out(trainer)
        self._queue.extend(_of_process(batch, trainer) for batch in self._updates.popleft())
        self.groups = self._groups.pop(0)
        self._behind += 1
        trainer.accumulation = len(self._queue)

    def _roll_out(self, trainer: Trainer) -> None:
        """Fill the updates. After a restart between two of them the rollout is that of the journal."""
        done, self._behind = self._behind if self._begun.get("updates") else 0, 0
        began = time.perf_counter()
        self._load(trainer)
        loading = time.perf_counter() - began
        made_with = self._begun.get("made_with") if done else None
        if made_with is None:
            weights = sum(n * i for i, n in enumerate(fingerprints(trainer.state.trainable).values(), 1))
            made_with = {**self._settings, "weights": weights}
        self._begun = {**self.get_state()[0], "made_with": made_with}
        rollout = self._rollout(trainer.step - done, made_with)
        if not self.rollouts.goes_on:
            self.engine.release()  # the step takes the memory of parameters and cache
        began = time.perf_counter()
        updates = self._packed(rollout)
        self._values |= {"seconds/pack": time.perf_counter() - began, "seconds/load": loading}
        scores = self.task.old_log_probs == "trainer"
        unscored = scores and any(answer.old is None for answer in answers_of(updates))
        if done and (rollout.fresh or unscored):
            raise UserError(
                f"{self.rollouts.journal.folder} has not all answers of the rollout of step {trainer.step - done}, of "
                f"which {done} updates are done: go on from an earlier checkpoint, or begin anew"
            )
        if unscored:
            self._score(trainer, rollout, updates)
        interval = self.task.log.start_interval_steps
        if interval is not None and not done and trainer.step % interval == 0:
            everything = [batch for update in updates for batch in update]
            self._values["start/kl3"] = self._old.distance_from_start(trainer, everything)
        self._updates.extend(updates[done:])
        self._groups = self._groups[done:]
        self._behind = done

    def _load(self, trainer: Trainer) -> None:
        """Give the engine the trainer's weights: the arrays themselves, or a copy on the engine's devices.

        Raises:
          RuntimeError: the copy is another one.
        """
        model = trainer.model
        copy = self.place.model(model)
        if copy is not model:
            values, trainable = vlm.variables(copy), trainer.state.trainable
            if fingerprints({path: values[path].get_value() for path in trainable}) != fingerprints(trainable):
                raise RuntimeError("the engine's copy of the weights is not what the trainer has")
        self.engine.load(copy)

    def _score(self, trainer: Trainer, rollout: Rollout, updates: Sequence[Sequence[AnswerSequences]]) -> None:
        """Compute the log-probabilities before the first update, and write them down."""
        began, sampling = time.perf_counter(), self.rollouts.sampling
        self._old.fill(trainer, [batch for update in updates for batch in update])
        for group, _ in rollout.selected if hosts.is_rank0() else ():
            self.rollouts.journal.add(self._old.noted(group, sampling(group.serial)))
        self.rollouts.journal.close()
        self._groups = [[self._old.noted(group, sampling(group.serial)) for group in own] for own in self._groups]
        self._values["seconds/score"] = time.perf_counter() - began
        if not self.task.selection.ahead:  # else tokens of earlier weights are drawn otherwise
            self._values["rollout/drawn_again"] = self._old.drawn_again

    def _rollout(self, version: int, made_with: Mapping[str, Any]) -> Rollout:
        """Return groups to train on; where all answers of each group earn the same, further prompts are asked.

        Raises:
          UserError: so it is again and again.
        """
        self.items, self._vain = {}, []
        for _ in range(_MOST_VAIN):
            rollout = self._run(version, made_with)
            self._take(rollout)
            self.items |= rollout.items
            if rollout.selected:
                return rollout
            self._vain += rollout.judged
            hosts.log_rank0(f"all of {len(rollout.judged)} groups of answers earned the same reward: asking others")
        raise UserError(
            f"{_MOST_VAIN} times in a row the answers of all groups earned the same reward, and gave no gradient: look "
            "at the rewards, the temperature, and whether the prompts are too easy or too hard"
        )

    def _run(self, version: int, made_with: Mapping[str, Any]) -> Rollout:
        def run() -> Rollout:
            return self.rollouts.run(self.stream, self.task.selection, self.rate, version, made_with)

        return run() if self._engines is None else roll_out(self._engines, run, self.rollouts.encode)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Measure the step; what follows waits for it anyway. An engine on devices of its own goes on meanwhile."""
        if self.place.is_apart:
            self.rollouts.go_on_until(lambda: all(value.is_ready() for value in jax.tree.leaves(result.metrics)))
        jax.block_until_ready(result.metrics)
        trained, sampled = time.perf_counter() - result.began, self._values["seconds/rollout"]
        self._values["seconds/train"] = trained
        self._values["trainer_idle"] = sampled / max(trained + sampled, 1e-9)

    def on_save(self, trainer: Trainer) -> None:
        if hosts.is_rank0():
            self.rollouts.journal.forget(trainer.step - self._keep)

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        self.rollouts.close()
        if self._engines is not None:
            self._engines.close()
        if error is None:
            self.engine.release()

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        return dict(self._values)

    def _take(self, rollout: Rollout) -> None:
        """Note what became of the prompts."""
        self._shortage.note(len(rollout.judged), rollout.lacking, _why(rollout.judged))
        self.stream.finish_step(rollout.last, rollout.outcomes, rollout.kept)
        useful = sum(is_useful(group) for group in rollout.judged)
        self.rate = self.rate[0] + len(rollout.judged), self.rate[1] + useful
        self._values = {
            **_values(rollout),
            "easy_pool": float(len(self.stream.easy)),
            "epoch": float(self.stream.epoch),
        }

    def _packed(self, rollout: Rollout) -> list[list[AnswerSequences]]:
        """Return the micro-batches of each update."""
        task, groups = self.task, [group for group, _ in rollout.selected]
        weighed = weigh(groups, task.advantage, task.policy_loss, task.rollout.max_tokens)
        done = []
        for group, span in zip(groups, spans(groups), strict=True):
            done.append(with_training(group, weighed.shaped[span], weighed.advantages[span].tolist()))
        chosen = {group.serial for group in done}
        others = [*self._vain, *(group for group in rollout.judged if group.serial not in chosen)]
        self._groups = []
        if weighed.left_out.all():
            raise UserError("every selected answer was cut at its longest length, and task.advantage.truncated is mask")
        places = spans(groups)
        updates = []
        for part in np.array_split(np.arange(len(groups)), min(task.updates, len(groups))):
            own = [groups[n] for n in part]
            self._groups.append([done[n] for n in part] + others)
            others = []
            # advantages of all answers, and denominators of those of the update
            weights = weigh(own, task.advantage, task.policy_loss, task.rollout.max_tokens)
            advantages = weighed.advantages[places[part[0]].start : places[part[-1]].stop]
            prompts = [rollout.selected[n][1].example for n in part]
            sampled = sampled_groups(
                own, prompts, weights._replace(advantages=advantages), sampling=self.rollouts.sampling
            )
            updates.append(packed_answers(sampled, self.shape, self._banned))
        return updates


def _of_process(batch: AnswerSequences, trainer: Trainer) -> AnswerSequences:
    """Return the sequences of a micro-batch that this process gives to the step."""
    if jax.process_count() == 1:
        return batch
    return dataclasses.replace(batch, policy=local_sequences(batch.policy, trainer.shard))


def banned_of(engine: Engine) -> Int[np.ndarray, "2 K"]:
    """Return the ids that an engine never gives, and never gives first, as `banned_ids`."""
    first = engine.banned if engine.banned_first is None else engine.banned_first
    return banned_ids(np.stack([engine.banned, first]))


def spans(groups: Sequence[GroupRecord]) -> list[slice]:
    """Return where the answers of each group stand among those of all."""
    ends = list(itertools.accumulate(len(group.answers) for group in groups))
    return [slice(end - len(group.answers), end) for group, end in zip(groups, ends, strict=True)]


def sampled_groups(
    groups: Sequence[GroupRecord],
    prompts: Sequence[Example],
    weighed: Weighed,
    *,
    sampling: Callable[[int], SamplingParams] | None = None,
) -> list[SampledGroup]:
    """Return the answers that have tokens in the loss, with their prompts.

    Args:
      sampling: how the answers of a group were drawn, where that is asked for.
    """
    found = []
    for group, prompt, span in zip(groups, prompts, spans(groups), strict=True):
        params = SamplingParams() if sampling is None else sampling(group.serial)
        answers = []
        for number, (answer, advantage, weight) in enumerate(
            zip(group.answers, weighed.advantages[span].tolist(), weighed.weights[span].tolist(), strict=True)
        ):
            if answer.tokens and weight > 0:
                old, draw = answer.old_log_probs or None, (params.seed, params.number + number)
                answers.append(SampledAnswer(answer.tokens, answer.log_probs, advantage, weight, old, *draw))
        found.append(SampledGroup(prompt, answers))
    return found


def _why(groups: Sequence[GroupRecord]) -> str:
    """Return why rewards are missing most often."""
    reasons = collections.Counter(a.reason for group in groups for a in group.answers if a.reward is None)
    return reasons.most_common(1)[0][0] if reasons else ""


def _values(rollout: Rollout) -> dict[str, float]:
    """Return what the log says about the time of a rollout."""
    timing = rollout.timing
    return {
        "started": float(timing.started),
        "judged": float(timing.judged),
        "aborted": float(timing.started - timing.judged),
        "reused": float(timing.reused),
        "rollout_idle": 1 - timing.busy / max(timing.seconds, 1e-9),
        "slot_use": timing.live_steps / max(timing.slot_steps, 1),
        "reward_wait": timing.reward_wait / max(timing.seconds, 1e-9),
        "waste": max(1 - timing.needed / max(timing.started, 1), 0.0),
        "seconds/rollout": timing.seconds,
        "decode_tokens_per_s": timing.tokens / max(timing.seconds, 1e-9),
    }
