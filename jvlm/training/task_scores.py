"""Scores on benchmarks during training, on a part of each that stays the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.evaluation import registry
from jvlm.evaluation.clients import LocalClient
from jvlm.evaluation.files import Rows
from jvlm.evaluation.run import Settings, evaluate
from jvlm.evaluation.store import SETTINGS
from jvlm.inference import sharding
from jvlm.json_files import read_object
from jvlm.models import vlm
from jvlm.training.config import EvaluationConfig
from jvlm.training.hooks import Hook, StepResult

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

FOLDER = "tasks"


class TaskScores(Hook):
    """Asks questions of benchmarks every so many steps, and writes the scores with their intervals into the log.

    Answers and scores are in ``<run>/tasks/step-N``, as `jvlm evaluate` writes them. A task that cannot be scored any
    more, because its files went away say, is told and counted, and does not end the training.

    Raises:
      UserError: a task that is not known, or whose files are not there; several processes, of which each would ask.
    """

    def __init__(self, config: EvaluationConfig, processor: Processor, folder: Path):
        if jax.process_count() > 1:
            raise UserError("evaluation.tasks is for one process; score checkpoints with jvlm evaluate instead")
        self._config, self._processor, self._folder = config, processor, folder / FOLDER
        self._tasks = registry.choose(config.tasks, registry.tasks())
        for task in self._tasks:
            Rows(task.files, Path(config.tasks_data), task.name)

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """Return whether the model after a step is scored."""
        return step % self._config.tasks_interval_steps == 0

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Score the model, if it is time."""
        if not self.is_due(trainer, trainer.step):
            return
        model = vlm.bind(trainer.template, {**trainer.state.params, **trainer.evaluated_params()})
        layout = sharding.inference_layout(model.config, devices=jax.local_devices())
        client = LocalClient(
            model, self._processor, batch_size=self._config.batch_size, layout=layout, name=f"step {trainer.step}"
        )
        output, data = self._folder / f"step-{trainer.step}", Path(self._config.tasks_data)
        self._put_aside(output, client)
        longest = self._config.tasks_max_new_tokens
        decoding = {} if longest is None else {"max_new_tokens": longest}
        settings, values = Settings(limit=self._config.tasks_limit, decoding=decoding), {}
        for task in self._tasks:
            try:
                (record,) = evaluate(client, [task], data, output, settings)
            except (UserError, OSError) as error:  # a score that cannot be had is no reason to lose the steps
                print(f"jvlm: {task.name} is not scored after step {trainer.step}: {error}")
                values[f"{task.name}_unscored"] = 1.0
                continue
            if record["value"] is not None:
                values[task.name] = record["value"]
                values[f"{task.name}_low"], values[f"{task.name}_high"] = record["interval"]
            for name, field in (("unread", "unparsed"), ("cut", "truncated"), ("failed", "failed")):
                values[f"{task.name}_{name}"] = float(record[field])
        trainer.evaluated(values)

    def _put_aside(self, output: Path, client: LocalClient) -> None:
        """Rename a step's answers of other weights: a run that goes on from an earlier checkpoint may reach others."""
        there = sorted(output.glob(f"*/{SETTINGS}"))
        described = json.loads(json.dumps(client.describe()))
        if all(read_object(path)["client"] == described for path in there):
            return
        number = next(n for n in itertools.count(1) if not output.with_name(f"{output.name}.before-{n}").exists())
        aside = output.with_name(f"{output.name}.before-{number}")
        output.rename(aside)
        print(f"jvlm: {output.name} was scored before with other weights; those answers are now in {aside}")
