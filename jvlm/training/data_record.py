"""Which data a checkpoint's position is a position in, and the table of sources at the start of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jvlm import config as config_tree
from jvlm.data.mixture.examples import Draws, mixture_of
from jvlm.data.position import start_states
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.training.config import Experiment
from jvlm.training.hooks import Hook

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer


class DataRecord(Hook):
    """Keeps with each checkpoint what the draws were made from, and refuses to go on with other draws.

    With ``accept_changes`` the run goes on, and its data begins anew: a position in other draws means nothing.

    Args:
      accepted: changes of the run were accepted at an earlier start, of which there may be no checkpoint yet.
    """

    def __init__(self, draws: Draws, experiment: Experiment, *, accepted: bool = False):
        self.record, self.accept = record_of(draws, experiment), experiment.accept_changes or accepted
        self._begins_anew = False

    def state(self) -> dict[str, Any]:
        return self.record

    def restore(self, state: dict[str, Any], step: int) -> None:
        changes = list(config_tree.differences(state, self.record))
        if changes and not self.accept:
            raise UserError(
                f"the checkpoint of step {step} is of a run on other data. Put it back, choose another --name, or "
                "go on with --accept_changes true, which begins the data anew:\n  " + "\n  ".join(changes)
            )
        self._begins_anew = bool(changes)

    def on_train_start(self, trainer: Trainer) -> None:
        if self._begins_anew:
            hosts.log_rank0(f"the data has changed since step {trainer.step} was saved: it begins anew")
            trainer.restore_data(start_states(trainer.shard.count))


def record_of(draws: Draws, experiment: Experiment) -> dict[str, Any]:
    """Return, as values for JSON, the name, files with bytes, examples, weight and seed of each source; the phases."""
    sources = mixture_of(experiment.data).sources()
    return {
        "seed": experiment.seed,
        "sources": {
            name: {
                "files": {Path(file).name: Path(file).stat().st_size for file in part.files},
                "examples": len(part),
                "weight": sources[name].weight,
                "seed": seed,
            }
            for name, part, seed in zip(draws.examples.names, draws.examples.parts, draws.seeds, strict=True)
        },
        "phases": [[start, list(spread.counts)] for start, spread in draws.plan.phases],
    }
