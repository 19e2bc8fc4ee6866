"""Reward models as a source of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.rl.rewards.source import RewardItem, missing
from jvlm.scoring.answers import spoken
from jvlm.scoring.score import Score

if TYPE_CHECKING:
    from jvlm.reward_model.scoring import RewardModel


class ModelReward:
    """The reward of a reward model, on the scale that is stored with it. It sees the answer without its thinking.

    Args:
      model: a loaded one.
      name: its folder.

    Raises:
      UserError: a model without a scale from 0 to 1.
    """

    def __init__(self, model: RewardModel, name: str):
        if model.scale is None:
            raise UserError(f"{name} has no scale from 0 to 1: fit it with jvlm reward-check {name} --fit_scale")
        self._model, self.name = model, name

    @classmethod
    def load(cls, folder: str) -> ModelReward:
        """Return the reward of a run or a Hugging Face folder."""
        from jvlm.reward_model.scoring import RewardModel  # brings the accelerator library

        return cls(RewardModel.load(folder), folder)

    def describe(self) -> dict[str, Any]:
        """Return what decides the rewards."""
        scale = self._model.scale
        return {"reward": "model", "model": self.name, "mean": scale and scale.mean, "std": scale and scale.std}

    def check(self, item: RewardItem) -> None:
        """Raise UserError for an item without a conversation."""
        if not item.messages:
            raise UserError(f"item {item.id}, messages: a reward model needs the conversation before the answer")

    def close(self) -> None:
        """Do nothing."""

    def scores(self, items: Sequence[RewardItem]) -> list[Score]:
        """Return the reward of each item; None for a conversation that cannot be read."""
        found: dict[int, Score] = {}
        examples = {}
        for n, item in enumerate(items):
            text = spoken(item.answer, thinking_opened=item.thinking_opened)
            if isinstance(text, Score):
                found[n] = text
                continue
            messages = [*item.messages, {"role": "assistant", "content": text}]
            try:
                examples[n] = self._model.processor.encode({"messages": messages, "images": list(item.images)})
            except ExampleError as error:
                found[n] = missing(error)
        scale = self._model.scale
        assert scale is not None
        for n, score in zip(examples, self._model.scores_of(list(examples.values())), strict=True):
            found[n] = Score(scale(score), "ok", round(score, 4))
        return [found[n] for n in range(len(items))]
