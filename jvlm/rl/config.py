"""What a run of policy optimisation is told: how answers are sampled, judged and weighed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jvlm.errors import UserError
from jvlm.rl.advantages import Estimator
from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled. Every token is drawn from the whole distribution at ``temperature``, which is also that
    of the loss: there is no top-p or top-k, which would have to be known to the loss.

    Attributes:
      answers: to each prompt: a group.
      max_tokens: longest answer; a longer one is cut there.
      temperature: divides the logits, in the engine and in the loss.
      slots: answers that are decoded together, by each process; a group must fit. Other answers wait.
      page_size: tokens of a page of the cache; None is the engine's choice. With at most 8 pages for the longest
        conversation there is one decoding program, and what an answer gets depends on no other to the last bit.
      pages: pages of the cache; None is as many as ``slots`` of the longest conversations need.
      prefill_tokens: tokens of prompts that are computed together; None is the longest prompt.
      devices: the last so many devices of each process draw answers and do not train; the weights are copied to them
        before each rollout, and ``parallel`` is the mesh of the others. None: all devices draw and train in turn, and
        nothing is copied where they lie in one process.
    """

    answers: int = 8
    max_tokens: int = 1024
    temperature: float = 1.0
    slots: int = 64
    page_size: int | None = None
    pages: int | None = None
    prefill_tokens: int | None = None
    devices: int | None = None

    def __post_init__(self):
        names = ("max_tokens", "slots", "page_size", "pages", "prefill_tokens", "devices")
        bounds = {**dict.fromkeys(names, "[1, inf)"), "answers": "[2, inf)", "temperature": "(0, inf)"}
        check_fields(self, "task.rollout.", bounds)
        if self.slots < self.answers:
            raise UserError(
                f"task.rollout.slots = {self.slots} holds no group of task.rollout.answers = {self.answers}"
            )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How answers are judged.

    Attributes:
      file: JSON file that says which reward judges which task (docs/alignment.md); None takes the verifiable reward of
        the task's name: "maths", "boxes", "count" and so on.
      rule: a verifiable reward that judges all answers, whatever their task, in place of ``file``.
      plugin: "FILE.py:NAME", a reward of your own that judges all answers, in place of ``file``.
      format_gate: with ``rule`` or ``plugin``: an answer without one closed <think> part earns nothing.
      service: address of a server of rewards (`jvlm reward-serve`), in place of ``file``.
      service_key_variable: environment variable with the service's key.
      task: of examples that name none, in "task", "data_source" or "ability".
      workers: groups that are judged at a time.
      perfect: least reward of an answer that cannot be better, by task; others 1. A group of such answers goes to the
        pool of easy prompts.
    """

    file: str | None = None
    rule: str | None = None
    plugin: str | None = None
    format_gate: bool = False
    service: str | None = None
    service_key_variable: str | None = None
    task: str | None = None
    workers: int = 4
    perfect: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "task.rewards.", {"workers": "[1, inf)"})
        given = [name for name in ("file", "rule", "plugin", "service") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"task.rewards.{' and task.rewards.'.join(given)} are ways of the same: give one of them")
        if self.format_gate and not self.judges_all:
            raise UserError("task.rewards.format_gate goes with rule or plugin; in a file each task has its own")

    @property
    def judges_all(self) -> str | None:
        """The name of the one reward that judges all answers; None where tasks have theirs."""
        return self.rule or self.plugin


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    Attributes:
      estimator: see `jvlm.rl.advantages.advantages`; MiMo-VL and GRPO have "group".
      eps: added to standard deviations; TRL has 1e-4.
      truncated: what an answer is that was cut at its longest length: "zero" earns nothing and is learnt from; "mask"
        counts in its group and is not learnt from (DAPO's filter).
      overlong_margin: answers within so many tokens of the longest length lose up to 1 (DAPO's soft punishment); None
        takes nothing off.
      repetition_weight: what an answer loses for its share of 3-grams that are there before; 0 is off.
    """

    estimator: Estimator = "group"
    eps: float = 0.0
    truncated: Literal["zero", "mask"] = "zero"
    overlong_margin: int | None = None
    repetition_weight: float = 0.0

    def __post_init__(self):
        bounds = {"eps": "[0, inf)", "overlong_margin": "[1, inf)", "repetition_weight": "[0, inf)"}
        check_fields(self, "task.advantage.", bounds)
