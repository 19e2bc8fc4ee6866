"""Scores of conversations under a reward model, several packed into a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jvlm
from jvlm.adapters.merge import merge
from jvlm.data import packing
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.quantization.kernels import quantized_kernels
from jvlm.reward_model.scale import RewardScale
from jvlm.reward_model.task import segment_scores


class RewardModel:
    """Scores conversations that end with an answer.

        reward_model = RewardModel.load("runs/reward_model")
        reward_model.rewards([{"messages": [...], "images": [...]}])

    Args:
      scale: of rewards between 0 and 1; None where it was never fitted.
      batch_size: packed sequences that are computed together.

    Raises:
      UserError: a model that gives no single score.
    """

    def __init__(self, model: VLM, processor: Processor, scale: RewardScale | None = None, *, batch_size: int = 1):
        if getattr(model.config.decoder, "labels", None) != 1:
            raise UserError("this is no reward model: it has no single score (adapt.labels = 1 makes one)")
        self.model, self.processor, self.scale, self.batch_size = model, processor, scale, batch_size
        self._values = {path: v.get_value() for path, v in vlm.variables(model).items()}
        self._scores = jax.jit(lambda values, batch: segment_scores(vlm.bind(model, values), batch)[0])

    @classmethod
    def load(cls, folder: str | Path, *, batch_size: int = 1) -> RewardModel:
        """Return the reward model of a run or a Hugging Face folder, with its scale if it has one.

        Adapters are merged, unless their base is quantised: every conversation would be computed through both.
        """
        model, processor = jvlm.load(folder)
        if model.adapters is not None and not any(quantized_kernels(model)):
            model = merge(model)
        return cls(model, processor, RewardScale.read(Path(folder)), batch_size=batch_size)

    def scores(self, conversations: Sequence[Any]) -> list[float]:
        """Return the score of each conversation, any number. Raises ExampleError for one that cannot be read."""
        return self.scores_of([self.processor.encode(conversation) for conversation in conversations])

    def rewards(self, conversations: Sequence[Any]) -> list[float]:
        """Return the reward of each conversation, from 0 to 1. Raises UserError without a scale."""
        if self.scale is None:
            raise UserError("the reward model has no scale: fit it with jvlm reward-check FOLDER --fit_scale")
        return [self.scale(score) for score in self.scores(conversations)]

    def scores_of(self, examples: Sequence[Example]) -> list[float]:
        """Return the score of each encoded conversation."""
        if not examples:
            return []
        group = self.processor.image_processor.patch_group
        tokens = packing.bucket(max(e.length for e in examples), 64)
        most = max(e.num_patches for e in examples)
        patches = packing.bucket(most, packing.patch_step(group, 256)) if most else 0
        packed = packing.best_fit_decreasing(examples, tokens, patches)
        found = np.zeros(len(examples))
        for start in range(0, len(packed), self.batch_size):
            sequences = packed[start : start + self.batch_size]
            rows = [[examples[i] for i in sequence] for sequence in sequences]
            rows += [[]] * (self.batch_size - len(rows))
            batch = packing.assemble(rows, tokens, patches, patch_values=self.processor.image_processor.patch_values)
            scores = np.asarray(self._scores(self._values, batch))
            for row, sequence in enumerate(sequences):
                found[list(sequence)] = scores[row, : len(sequence)]
        return found.tolist()
