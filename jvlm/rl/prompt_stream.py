"""Which prompt is asked next: examples in the order of their epoch, and now and then one of those that are easy.

What a serial number asks for depends on the recorded state alone: not on time, nor on which answers came first. So a
run that was killed, or whose engines are slower, asks the same. (MiMo-VL's pool of easy prompts, arXiv 2506.03569.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvlm.errors import UserError
from jvlm.validation import check_fields

_ORDER, _POOL, _PICK = range(3)  # kinds of draws


@dataclasses.dataclass(frozen=True)
class PromptStreamConfig:
    """How prompts are drawn.

    Attributes:
      easy_share: chance that a prompt is drawn from those that were answered perfectly; MiMo-VL takes 0.1.
      drop_hard_after: leave an example out after so many groups without any reward; None never does.
    """

    easy_share: float = 0.1
    drop_hard_after: int | None = None

    def __post_init__(self):
        check_fields(self, "prompts.", {"easy_share": "[0, 1]", "drop_hard_after": "[1, inf)"})


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to be answered by a group.

    Attributes:
      serial: number of the group in the run.
      example: index of the example.
      from_pool: whether it was drawn from the easy ones.
    """

    serial: int
    example: int
    from_pool: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a group, by its raw rewards.

    Attributes:
      perfect: every answer is as good as can be.
      hopeless: no answer earned anything.
    """

    perfect: bool = False
    hopeless: bool = False


class PromptStream:
    """Hands out prompts by serial number; between steps it takes note of what became of them.

    Args:
      size: number of examples.
      state: of `state`, to go on from.

    Raises:
      UserError: no examples, or a state of another number of them.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        config: PromptStreamConfig = PromptStreamConfig(),
        state: Mapping[str, Any] | None = None,
    ):
        if size < 1:
            raise UserError("there is no prompt to ask: the training data is empty")
        self.size, self.seed, self.config = size, seed, config
        state = state or {"size": size, "serial": 0, "epoch": 0, "position": 0, "easy": [], "gone": [], "hard": {}}
        if state["size"] != size:
            raise UserError(
                f"the run was begun with {state['size']} prompts, and there are {size}: give it the same data"
            )
        self.serial: int = state["serial"]
        self.easy: list[int] = list(state["easy"])
        self.gone: set[int] = set(state["gone"])
        self._hard = {int(example): count for example, count in state["hard"].items()}
        self._start = state["epoch"], state["position"]
        # with the epoch and position behind it
        self._drawn = [(Prompt(*prompt), epoch, position) for prompt, epoch, position in state.get("drawn", ())]
        self._kept = len(self._drawn)  # of those, that were drawn in earlier steps
        self._order: tuple[int, np.ndarray] | None = None

    def state(self) -> dict[str, Any]:
        """Return what `PromptStream` goes on from, as JSON values: after the last `finish_step`."""
        epoch, position = self._start
        state = {"size": self.size, "serial": self.serial, "epoch": epoch, "position": position}
        hard = {str(example): count for example, count in sorted(self._hard.items())}
        drawn = [[list(dataclasses.astuple(prompt)), *behind] for prompt, *behind in self._drawn[: self._kept]]
        return {**state, "easy": list(self.easy), "gone": sorted(self.gone), "hard": hard, "drawn": drawn}

    @property
    def epoch(self) -> int:
        """Passes over the examples that are behind, after the last `finish_step`."""
        return self._start[0]

    def prompt(self, serial: int) -> Prompt:
        """Return the prompt of a serial number of the present step. Raises UserError if no example is left to ask."""
        while len(self._drawn) <= serial - self.serial:
            self._drawn.append(self._draw(self.serial + len(self._drawn)))
        return self._drawn[serial - self.serial][0]

    def _draw(self, serial: int) -> tuple[Prompt, int, int]:
        epoch, position = self._drawn[-1][1:] if self._drawn else self._start
        if self.easy and self._uniform(_POOL, serial) < self.config.easy_share:
            example = self.easy[int(self._uniform(_PICK, serial) * len(self.easy))]
            return Prompt(serial, example, True), epoch, position
        if len(self.gone) == self.size:
            raise UserError(
                f"all {self.size} prompts are answered perfectly or given up: nothing is left to train on; give "
                "harder ones"
            )
        while True:
            if position == self.size:
                epoch, position = epoch + 1, 0
            example = int(self._permutation(epoch)[position])
            position += 1
            if example not in self.gone:
                return Prompt(serial, example, False), epoch, position

    def _uniform(self, kind: int, serial: int) -> float:
        return float(np.random.default_rng([self.seed, kind, serial]).random())

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.size)
        return self._order[1]

    def finish_step(self, last: int, outcomes: Mapping[int, Outcome], keep: int = 0) -> None:
        """End a step that used the groups up to ``last``: perfect ones move to the pool, others back to the stream.

        Args:
          last: serial of the last group that was selected; later ones are forgotten, and their prompts asked again.
          outcomes: of the groups up to it.
          keep: groups behind it that go on, with the prompts that they have.

        Raises:
          ValueError: a group up to ``last`` has no outcome.
        """
        for serial in range(self.serial, last + 1):
            prompt, outcome = self.prompt(serial), outcomes.get(serial)
            if outcome is None:
                raise ValueError(f"group {serial} was not judged, but {last} was selected")
            self._note(prompt, outcome)
        if last >= self.serial:
            self._start = self._drawn[last - self.serial][1:]
            behind = self._drawn[last - self.serial + 1 :]
            self.serial, self._drawn, self._kept = last + 1, behind[:keep], min(keep, len(behind))

    def _note(self, prompt: Prompt, outcome: Outcome) -> None:
        example = prompt.example
        if outcome.perfect:
            if example not in self.easy:
                self.easy.append(example)
            self.gone.add(example)
        elif prompt.from_pool and example in self.easy:
            self.easy.remove(example)
            self.gone.discard(example)
        self._hard[example] = self._hard.get(example, 0) + 1 if outcome.hopeless else 0
        if not self._hard[example]:
            del self._hard[example]
        elif self.config.drop_hard_after is not None and self._hard[example] >= self.config.drop_hard_after:
            self.gone.add(example)
