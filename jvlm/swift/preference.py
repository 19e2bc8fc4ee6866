"""ms-swift's arguments of preference training as a task, and what they ask of the data."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Literal

from jvlm.errors import UserError
from jvlm.preference.labels import LabelledTask
from jvlm.preference.losses import REFERENCE_FREE, PairLoss
from jvlm.preference.pairs import PreferenceTask
from jvlm.reward_model.task import RewardTask
from jvlm.swift import grpo
from jvlm.swift.arguments import GrpoArguments, PreferenceArguments, RlhfArguments
from jvlm.training.task import Task

_OF_DPO = tuple(kind for kind in typing.get_args(PairLoss) if kind not in REFERENCE_FREE)
REFERENCE = "reference_log_probs.npz"
# arguments of one type of training that change nothing in the others
_OWN = {
    "loss_type": ("dpo", "kto", "grpo"),
    "loss_weights": ("dpo",),
    "rpo_alpha": ("dpo",),
    "ld_alpha": ("dpo",),
    "precompute_ref_log_probs": ("dpo",),
    "discopop_tau": ("dpo",),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "label_smoothing": ("dpo",),
    "center_rewards_coefficient": ("rm",),
    "beta": ("dpo", "cpo", "simpo", "orpo", "kto", "grpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    **{field.name: ("grpo",) for field in dataclasses.fields(GrpoArguments)},
}


def data_kind(arguments: PreferenceArguments) -> Literal["pairs", "labels"]:
    """Return what examples are read for."""
    return "labels" if arguments.rlhf_type == "kto" else "pairs"


def task_of(arguments: RlhfArguments, given: frozenset[str] = frozenset(), folder: str = "") -> Task:
    """Return the task of the arguments; that of grpo with one group a step, which `jvlm.swift.grpo` replaces.

    Args:
      folder: of the run.
      given: names of the arguments that were typed.

    Raises:
      UserError: arguments of another type of training, an unknown loss, a reference that is not held.
    """
    own, optimization = arguments.preference, arguments.optimization
    for name in sorted(given & _OWN.keys()):
        if own.rlhf_type not in _OWN[name]:
            wanted = " or ".join(_OWN[name])
            raise UserError(
                f"--{name} is an argument of --rlhf_type {wanted}, and this is {own.rlhf_type}: leave it out"
            )
    if optimization.neftune_noise_alpha:
        raise UserError("--neftune_noise_alpha: noise would make a model differ from its reference; leave it out")
    if own.rlhf_type == "grpo":
        return grpo.task_of(arguments, 1)
    if own.rlhf_type == "rm":
        return RewardTask(own.center_rewards_coefficient or 0.0)
    reference = _reference(arguments)
    beta = own.beta if own.beta is not None else 2.0 if own.rlhf_type == "simpo" else 0.1
    common = {"beta": beta, "label_smoothing": own.label_smoothing}
    if own.rlhf_type == "kto":
        weights = {name: getattr(own, name) for name in ("desirable_weight", "undesirable_weight")}
        return LabelledTask(_labelled_loss(own), beta, **weights, reference=reference)
    if own.rlhf_type == "dpo":
        losses, weights, sft = _losses(own)
        extra = {"ld_alpha": 1.0 if own.ld_alpha is None else own.ld_alpha, "discopop_tau": own.discopop_tau}
        if own.precompute_ref_log_probs:
            common |= {"reference_file": str(Path(folder, REFERENCE))}
            reference = "precomputed"
        return PreferenceTask(losses, weights, sft, **common, **extra, reference=reference)
    sft = 1.0 if own.rlhf_type == "orpo" else own.cpo_alpha
    return PreferenceTask((own.rlhf_type,), (), sft, **common, gamma=own.simpo_gamma)


def _labelled_loss(own: PreferenceArguments) -> Literal["kto", "apo_zero_unpaired"]:
    kinds = own.loss_type or ("kto",)
    if kinds not in (("kto",), ("apo_zero_unpaired",)):
        raise UserError(f"--loss_type cannot be {' '.join(kinds)!r} of kto: it is kto or apo_zero_unpaired")
    return kinds[0]


def _losses(own: PreferenceArguments) -> tuple[tuple[PairLoss, ...], tuple[float, ...], float]:
    """Return (losses, factor of each, factor of the supervised loss)."""
    kinds = own.loss_type or ("sigmoid",)
    weights = own.loss_weights or (1.0,) * len(kinds)
    if len(weights) != len(kinds):
        raise UserError(f"--loss_weights has {len(weights)} numbers for {len(kinds)} of --loss_type: give one for each")
    unknown = [kind for kind in kinds if kind not in (*_OF_DPO, "sft")]
    if unknown:
        raise UserError(f"--loss_type cannot be {unknown[0]!r}: it is one or several of {', '.join((*_OF_DPO, 'sft'))}")
    of_pairs = [(kind, weight) for kind, weight in zip(kinds, weights, strict=True) if kind != "sft"]
    if not of_pairs:
        raise UserError("--loss_type sft alone learns nothing of rejected answers: jvlm sft trains on the chosen ones")
    sft = sum(weight for kind, weight in zip(kinds, weights, strict=True) if kind == "sft") + (own.rpo_alpha or 0.0)
    factors = tuple(weight for _, weight in of_pairs)
    return tuple(kind for kind, _ in of_pairs), () if set(factors) == {1.0} else factors, sft


def _reference(arguments: RlhfArguments) -> Literal["copy", "adapter_off"]:
    """Return the reference: the base of new adapters, or a copy of what is trained."""
    own, tuner, model = arguments.preference, arguments.tuner, arguments.model.model
    if own.ref_model is not None and (model is None or Path(own.ref_model) != Path(model)):
        raise UserError(
            f"--ref_model {own.ref_model}: the reference is the model before training, {model}; leave --ref_model out"
        )
    if own.ref_adapters and own.ref_adapters != tuner.adapters:
        raise UserError(
            f"--ref_adapters {' '.join(own.ref_adapters)}: the reference is the model before training, with the "
            "adapter of --adapters where one is given; leave --ref_adapters out"
        )
    goes_on = bool(tuner.adapters) or arguments.output.resume_only_model
    is_new = tuner.train_type == "lora" and not goes_on and not tuner.modules_to_save and tuner.lora_bias == "none"
    return "adapter_off" if is_new else "copy"
