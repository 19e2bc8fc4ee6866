"""What an experiment must be like for its preference task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jvlm.adapters import plan
from jvlm.errors import UserError
from jvlm.models.vlm import VLM
from jvlm.preference.log_probs import Reference

if TYPE_CHECKING:
    from jvlm.training.config import Experiment


def check_data(experiment: Experiment, kind: Literal["pairs", "labels"]) -> None:
    """Raise UserError for data that is read for something else than the task learns from."""
    for data in (experiment.data, *(stage.data for stage in experiment.stages)):
        if data.preference != kind:
            raise UserError(
                f"data.preference is {data.preference!r}, and {type(experiment.task).__name__} learns from {kind!r}: "
                f"set data.preference = {kind!r}"
            )


def check_reference(reference: Reference, experiment: Experiment, template: VLM) -> None:
    """Raise UserError where a model without its adapters is not what it was before the first step."""
    if reference == "precomputed" and not getattr(experiment.task, "reference_file", None):
        raise UserError("task.reference 'precomputed' needs task.reference_file: a name for the file")
    if reference != "adapter_off":
        return
    fix = "take task.reference = 'copy', which holds a frozen copy of what is trained"
    if template.adapters is None:
        raise UserError(f"task.reference 'adapter_off' needs adapters (adapter), and the model has none: {fix}")
    if template.adapters.parameters or template.adapters.token_ids:
        raise UserError(
            "task.reference 'adapter_off': parameters of the base are trained beside the adapters "
            f"({', '.join(template.adapters.parameters[:3]) or 'rows of tokens'}): {fix}"
        )
    start = experiment.init_from
    trained = experiment.adapters_from or (start if start and plan.read(Path(start)) is not None else None)
    if trained is not None:
        raise UserError(f"task.reference 'adapter_off': the adapters of {trained} have been trained already: {fix}")
