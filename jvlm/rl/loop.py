"""The hook that feeds the trainer with rollouts of its own weights, and remembers where they are."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jaxtyping import Int

from jvlm.data.packing import Example
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.rl.log_probs import banned_ids
from jvlm.rl.packing import SampledAnswer, SampledGroup, Shape, packed_answers
from jvlm.rl.prompt_stream import PromptStream
from jvlm.rl.records import GroupRecord, with_training
from jvlm.rl.rewards.shortage import Shortage
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollouts import Rollout, Rollouts, is_useful
from jvlm.rl.task import AnswerSequences, PolicyTask
from jvlm.rl.weighing import Weighed, weigh
from jvlm.training.hooks import Hook, StepResult
from jvlm.weights.fingerprints import fingerprints

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


class PolicyLoop(Hook):
    """Before each step: rolls out with the trainer's weights, without a copy, and hands it the packed answers.

    It is also the iterator of the trainer's batches, so that the state of prompts and rates is the position in the data
    which checkpoints keep.

    Args:
      prompts: how many there are.
      shape: of a micro-batch.
      settings: what decides answers and rewards beside the weights, for the journal.
      keep: steps before the present one whose journal is kept.

    Attributes:
      groups: of the present step, those that it trains on first; for whoever writes them down.
      items: what was asked in them, without an answer, by serial number.
    """

    def __init__(
        self,
        task: PolicyTask,
        engine: Engine,
        rollouts: Rollouts,
        prompts: int,
        shape: Shape,
        *,
        seed: int,
        settings: Mapping[str, Any],
        keep: int,
    ):
        self.task, self.engine, self.rollouts, self.shape = task, engine, rollouts, shape
        self.stream = PromptStream(prompts, seed, task.prompts)
        self.rate = 0, 0
        self.groups: list[GroupRecord] = []
        self.items: dict[int, RewardItem] = {}
        self._prompts, self._seed, self._settings, self._keep = prompts, seed, dict(settings), keep
        self._banned = banned_of(engine)
        self._queue: collections.deque[AnswerSequences] = collections.deque()
        self._shortage = Shortage()
        self._values: dict[str, float] = {}

    # -- the batches of the trainer

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnswerSequences:
        return self._queue.popleft()

    def get_state(self) -> list[dict[str, Any]]:
        """Return what the next rollout goes on from; one value, as of one process."""
        return [{"prompts": self.stream.state(), "rate": list(self.rate)}]

    def set_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a `get_state`."""
        self.stream = PromptStream(self._prompts, self._seed, self.task.prompts, state[0]["prompts"])
        judged, useful = state[0]["rate"]
        self.rate = judged, useful

    # -- steps

    def on_step_start(self, trainer: Trainer) -> None:
        """Roll out and pack."""
        self.engine.load(trainer.model)
        weights = sum(n * i for i, n in enumerate(fingerprints(trainer.state.trainable).values(), 1))
        made_with = {**self._settings, "weights": weights}
        rollout = self.rollouts.run(self.stream, self.task.selection, self.rate, trainer.step, made_with)
        self.engine.release()  # the step takes the parameters' memory
        self.items = rollout.items
        self._take(rollout)
        packing_began = time.perf_counter()
        self._queue.extend(self._packed(rollout))
        trainer.accumulation = len(self._queue)
        self._values["seconds/pack"] = time.perf_counter() - packing_began

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Measure the step; what follows waits for it anyway."""
        jax.block_until_ready(result.metrics)
        trained, sampled = time.perf_counter() - result.began, self._values["seconds/rollout"]
        self._values["seconds/train"] = trained
        self._values["trainer_idle"] = sampled / max(trained + sampled, 1e-9)

    def on_save(self, trainer: Trainer) -> None:
        self.rollouts.journal.forget(trainer.step - self._keep)

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        self.rollouts.close()

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        return dict(self._values)

    def _take(self, rollout: Rollout) -> None:
        """Note what became of the prompts."""
        self._shortage.note(len(rollout.judged), rollout.lacking, _why(rollout.judged))
        self.stream.finish_step(rollout.last, rollout.outcomes)
        useful = sum(is_useful(group) for group in rollout.judged)
        self.rate = self.rate[0] + len(rollout.judged), self.rate[1] + useful
        self._values = {
            **_values(rollout),
            "easy_pool": float(len(self.stream.easy)),
            "epoch": float(self.stream.epoch),
        }

    def _packed(self, rollout: Rollout) -> list[AnswerSequences]:
        """Return the micro-batches of a step."""
        task, groups = self.task, [group for group, _ in rollout.selected]
        weighed = weigh(groups, task.advantage, task.policy_loss, task.rollout.max_tokens)
        done = []
        for group, span in zip(groups, spans(groups), strict=True):
            done.append(with_training(group, weighed.shaped[span], weighed.advantages[span].tolist()))
        chosen = {group.serial for group in done}
        self.groups = [*done, *(group for group in rollout.judged if group.serial not in chosen)]
        if weighed.left_out.all():
            raise UserError("every selected answer was cut at its longest length, and task.advantage.truncated is mask")
        prompts = [prompt.example for _, prompt in rollout.selected]
        sampled = sampled_groups(groups, prompts, weighed)
        return packed_answers(sampled, self.shape, self._banned)


def banned_of(engine: Engine) -> Int[np.ndarray, "2 K"]:
    """Return the ids that an engine never gives, and never gives first, as `banned_ids`."""
    first = engine.banned if engine.banned_first is None else engine.banned_first
    return banned_ids(np.stack([engine.banned, first]))


def spans(groups: Sequence[GroupRecord]) -> list[slice]:
    """Return where the answers of each group stand among those of all."""
    ends = list(itertools.accumulate(len(group.answers) for group in groups))
    return [slice(end - len(group.answers), end) for group, end in zip(groups, ends, strict=True)]


def sampled_groups(groups: Sequence[GroupRecord], prompts: Sequence[Example], weighed: Weighed) -> list[SampledGroup]:
    """Return the answers that have tokens in the loss, with their prompts."""
    found = []
    for group, prompt, span in zip(groups, prompts, spans(groups), strict=True):
        rows = zip(group.answers, weighed.advantages[span].tolist(), weighed.weights[span].tolist(), strict=True)
        found.append(
            SampledGroup(
                prompt,
                [
                    SampledAnswer(answer.tokens, answer.log_probs, value, weight)
                    for answer, value, weight in rows
                    if answer.tokens and weight > 0
                ],
            )
        )
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
        "waste": 1 - timing.needed / max(timing.started, 1),
        "seconds/rollout": timing.seconds,
        "decode_tokens_per_s": timing.tokens / max(timing.seconds, 1e-9),
    }
