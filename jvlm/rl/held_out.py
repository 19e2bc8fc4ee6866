"""Held-out prompts, answered greedily every so many steps: whether a policy gets better at its tasks."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.requests import Request, SamplingParams
from jvlm.parallel import hosts
from jvlm.rl.meshes import EnginePlace
from jvlm.rl.prompts import EncodedPrompt
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollouts import Judge
from jvlm.training.hooks import Hook, StepResult

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


class HeldOutRewards(Hook):
    """Judges greedy answers to the same prompts before the first step, every so many, and after the last.

    Of several processes the first one answers them. The means are "reward/TASK" of an evaluation: lines of their own in
    the log, as "eval_reward/TASK".

    Args:
      place: of the engine's parameters.
      prompts: to be asked.
      max_tokens: longest answer.
    """

    def __init__(
        self,
        engine: Engine,
        place: EnginePlace,
        prompts: Sequence[EncodedPrompt],
        judge: Judge,
        interval_steps: int,
        max_tokens: int,
    ):
        self._engine, self._place, self._prompts, self._judge = engine, place, prompts, judge
        self._interval, self._sampling = interval_steps, SamplingParams(max_tokens=max_tokens, stream=False)

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """Return whether the model after a step is judged."""
        return step % self._interval == 0 or step == trainer.steps

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == 0:
            self._evaluate(trainer)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if self.is_due(trainer, trainer.step):
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        self._engine.load(self._place.model(trainer.model))
        values = hosts.run_on_all(lambda: self._values() if hosts.is_rank0() else {})
        self._engine.release()
        trainer.evaluated(hosts.broadcast_from_0(values))

    def _values(self) -> dict[str, float]:
        answered = answers(self._engine, self._prompts, self._sampling)
        scores = self._judge.scores(answered)
        by_task: dict[str, list[float]] = {}
        for item, score in zip(answered, scores, strict=True):
            if score.value is not None:
                by_task.setdefault(item.task, []).append(score.value)
        return {f"reward/{task}": statistics.fmean(own) for task, own in sorted(by_task.items())}


def answers(engine: Engine, prompts: Sequence[EncodedPrompt], sampling: SamplingParams) -> list[RewardItem]:
    """Return each prompt with an answer, as rewards are asked for it.

    Raises:
      UserError: the engine gave none.
    """
    texts, ends = [""] * len(prompts), [""] * len(prompts)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(f"held out {number}", prompt.example, sampling))
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            number = int(event.request_id.rpartition(" ")[2])
            texts[number] += event.text
            ends[number] = event.finish_reason or ends[number]
    if "" in ends:
        raise UserError(f"the engine gave no answer to {prompts[ends.index('')].item.id}")
    return [
        dataclasses.replace(prompt.item, answer=text, truncated=end == "length")
        for prompt, text, end in zip(prompts, texts, ends, strict=True)
    ]
