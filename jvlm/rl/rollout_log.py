"""The hook that writes down what a run of policy optimisation samples: files, log, alarms, and a page to look at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jvlm.data.view.page import write
from jvlm.parallel import hosts
from jvlm.rl import samples, step_log
from jvlm.rl.alarms import Alarm, Alarms, stopped
from jvlm.rl.log_config import RolloutLogConfig
from jvlm.rl.records import GroupRecord
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rollout_files import ROLLOUTS, RolloutWriter, StoredGroup
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.side_files import read_lines, write_lines
from jvlm.training.train_step import SOURCES

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

ALARMS = "alarms.jsonl"  # in the folder of a run


class StepGroups(Protocol):
    """What of the loop is written down."""

    groups: list[GroupRecord]
    items: Mapping[int, RewardItem]


class RolloutLog(Hook):
    """Writes the groups of each step down, and watches them.

    Args:
      loop: has the groups of the present step, and their prompts by serial number.
      folder: of the run.
      images_of: contents of the image files of a prompt, by the number of its example.
      perfect: least reward of an answer that cannot be better, by task.
      rewards: what decides the rewards, as `RewardSource.describe` has it; stored with each step.
    """

    def __init__(
        self,
        loop: StepGroups,
        folder: Path,
        config: RolloutLogConfig,
        images_of: Callable[[int], Sequence[bytes]],
        perfect: Mapping[str, float],
        rewards: Mapping[str, Any],
    ):
        self._loop, self._folder, self._config = loop, folder, config
        self._images_of, self._perfect, self._rewards = images_of, dict(perfect), dict(rewards)
        self._alarms = Alarms(config.alarms)
        self._values: dict[str, float] = {}
        self._writer: RolloutWriter | None = None

    def state(self) -> Any:
        return self._alarms.state()

    def restore(self, state: Any, step: int) -> None:
        self._alarms = Alarms(self._config.alarms, state)

    def on_train_start(self, trainer: Trainer) -> None:
        if not hosts.is_rank0():
            return
        if self._config.store:
            self._writer = RolloutWriter(self._folder / ROLLOUTS, trainer.step)
        told = [line for line in read_lines(self._folder / ALARMS) if line["step_number"] <= trainer.step]
        write_lines(self._folder / ALARMS, told)

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """Return whether a step is written down: every one is, as the next rollout waits for its weights."""
        return True

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        groups, step = self._loop.groups, result.step
        metrics = {name: float(value) for name, value in result.metrics.items() if name != SOURCES}
        golds = {serial: item.gold for serial, item in self._loop.items.items()}
        self._values = {
            **step_log.values_of(groups, self._perfect, golds),
            **step_log.ages_of(groups, step - 1),
        }
        summary = _plain({**metrics, **self._values})
        if self._writer is not None:
            for group in groups:
                if group.serial in self._loop.items:
                    item = self._loop.items[group.serial]
                    self._writer.append(step, group, item, item.images or self._images_of(group.example))
            self._writer.finish_step(step, {**summary, "rewards": self._rewards})
        interval = self._config.samples_interval_steps
        if hosts.is_rank0() and (step % interval == 0 or step in (trainer.start + 1, trainer.steps)):
            self._draw(step, groups, summary)
        self._tell(trainer, self._alarms.check({**metrics, **self._values}))

    def _draw(self, step: int, groups: Sequence[GroupRecord], values: Mapping[str, Any]) -> None:
        stored = [
            StoredGroup(step, group, self._loop.items[group.serial])
            for group in groups
            if group.serial in self._loop.items
        ]
        page = samples.render(step, stored, lambda one: one.prompt.images or self._images_of(one.group.example), values)
        write(self._folder / samples.SAMPLES, page)

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        self._tell(trainer, self._alarms.evaluated(values))

    def _tell(self, trainer: Trainer, alarms: Sequence[Alarm]) -> None:
        """Print alarms and write them down; end the run where one says so.

        Raises:
          UserError: an alarm ends the run.
        """
        # process 0 knows the prompts of all groups
        told = hosts.broadcast_from_0([dataclasses.asdict(alarm) for alarm in alarms])
        alarms = [Alarm(**alarm) for alarm in told]
        if not alarms:
            return
        if hosts.is_rank0():
            self._write(trainer, alarms)
        stopped(alarms)

    def _write(self, trainer: Trainer, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            print(f"ALARM {alarm.name}, step {trainer.step}: {alarm.text}", flush=True)
        lines = [{"step_number": trainer.step, **dataclasses.asdict(alarm)} for alarm in alarms]
        write_lines(self._folder / ALARMS, [*read_lines(self._folder / ALARMS), *lines])

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        return dict(self._values)

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return values as JSON has them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
