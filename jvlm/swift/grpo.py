"""ms-swift's arguments of ``--rlhf_type grpo`` as an experiment of policy optimisation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import jax

from jvlm.data.config import DataConfig
from jvlm.data.mixture.examples import Examples
from jvlm.errors import UserError
from jvlm.parallel import hosts
from jvlm.rl.advantages import Estimator
from jvlm.rl.config import AdvantageConfig, RewardConfig, RolloutConfig
from jvlm.rl.losses import PolicyLoss
from jvlm.rl.rewards.rules import RULES
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.task import PolicyTask
from jvlm.swift import language_model
from jvlm.swift.arguments import GrpoArguments, RlhfArguments
from jvlm.training.config import Experiment

_BETA = 0.04
_SHAPING = ("format", "repetition", "soft_overlong")
_ACCURACY = "accuracy"
_SLOTS = 64  # answers that are decoded together, on each device


def task_of(arguments: RlhfArguments, groups: int, devices: int = 1) -> PolicyTask:
    """Return the task of the arguments.

    Args:
      groups: of answers that a step trains on.

    Raises:
      UserError: what the loss or the rewards here do not know, with the nearest thing.
    """
    own, preference = arguments.grpo, arguments.preference
    if (own.top_p, own.top_k) != (1.0, 0):
        raise UserError(
            f"--top_p {own.top_p:g} --top_k {own.top_k}: the loss is that of the whole distribution, so answers are "
            "drawn from it: leave both out, and lower --temperature instead"
        )
    rounds = 1 + own.max_resample_times if own.dynamic_sample else 1
    loss = _loss(own, preference.loss_type, _BETA if preference.beta is None else preference.beta)
    return PolicyTask(
        policy_loss=loss,
        advantage=_advantage(own),
        rollout=RolloutConfig(
            answers=own.num_generations,
            max_tokens=own.max_completion_length,
            temperature=own.temperature,
            slots=max(_SLOTS * devices, own.num_generations),
        ),
        rewards=_rewards(own),
        selection=SelectionConfig(groups=groups, most_started=float(rounds)),
        old_log_probs="engine" if loss.correction == "none" else "trainer",
    )


def _loss(own: GrpoArguments, loss_type: tuple[str, ...] | None, beta: float) -> PolicyLoss:
    (kind, *more) = loss_type or ("grpo",)
    normalise = {"grpo": "sequence", "bnpo": "batch", "dr_grpo": "constant", "dapo": "batch", "cispo": "batch"}
    if more or kind not in normalise:
        given = " ".join(loss_type or ())
        raise UserError(f"--loss_type cannot be {given!r} of grpo: it is one of {', '.join(normalise)}")
    high = own.epsilon if own.epsilon_high is None else own.epsilon_high
    bounds = {"ratio_low": 1 - own.epsilon, "ratio_high": 1 + high}
    if kind == "cispo":  # where epsilon_high is the largest weight itself
        if own.epsilon_high is None or own.epsilon_high < 1:
            raise UserError("--loss_type cispo: --epsilon_high is the largest weight of a token, 1 or more; 5 is usual")
        bounds = {"ratio_low": 0.0, "ratio_high": own.epsilon_high}
    elif own.importance_sampling_level == "sequence":
        kind = "gspo"
    correction = {}
    if own.rollout_importance_sampling_mode is not None:
        correction = {
            "correction": own.rollout_importance_sampling_mode,
            "correction_low": 0.0,
            "correction_high": own.rollout_importance_sampling_threshold,
        }
    constant = own.max_completion_length if kind == "dr_grpo" else None
    return PolicyLoss(
        kind=kind if kind in ("gspo", "cispo") else "ppo",
        **bounds,
        ratio_cap=own.delta,
        normalise=normalise[(loss_type or ("grpo",))[0]],
        constant_length=constant if kind != "gspo" else None,
        kl_weight=beta,
        **correction,
    )


def _advantage(own: GrpoArguments) -> AdvantageConfig:
    usual = {"grpo": "group", "rloo": "none", "reinforce_plus_plus": "batch"}[own.advantage_estimator]
    scale = usual if own.scale_rewards == "auto" else own.scale_rewards
    known: dict[tuple[str, str], Estimator] = {
        ("grpo", "group"): "group",
        ("grpo", "batch"): "batch",
        ("grpo", "none"): "mean",
        ("rloo", "none"): "rloo",
        ("reinforce_plus_plus", "batch"): "reinforce++_baseline",
    }
    estimator = known.get((own.advantage_estimator, scale))
    if estimator is None:
        raise UserError(
            f"--advantage_estimator {own.advantage_estimator} --scale_rewards {scale} is not known here: leave "
            f"--scale_rewards out, which is {usual}"
        )
    margin = None
    if "soft_overlong" in own.reward_funcs:
        if own.soft_cache_length is None or own.soft_max_length not in (None, own.max_completion_length):
            raise UserError(
                "--reward_funcs soft_overlong needs --soft_cache_length, the tokens in which the punishment rises; "
                f"--soft_max_length, where it is given, must be --max_completion_length {own.max_completion_length}"
            )
        margin = own.soft_cache_length
    return AdvantageConfig(
        estimator=estimator,
        eps=1e-4,
        truncated="mask" if own.overlong_filter else "zero",
        overlong_margin=margin,
        repetition_weight=-own.repetition_max_penalty if "repetition" in own.reward_funcs else 0.0,
    )


def _rewards(own: GrpoArguments) -> RewardConfig:
    judging = [name for name in own.reward_funcs if name not in _SHAPING]
    gate = "format" in own.reward_funcs
    if len(judging) != 1:
        problem = f"{', '.join(judging)} are several" if judging else "nothing judges the answers"
        raise UserError(
            f"--reward_funcs {' '.join(own.reward_funcs)}: {problem}; give one of {_ACCURACY}, {', '.join(RULES)}, or "
            "a reward of --external_plugins, which may add up what it likes; format, repetition and soft_overlong go "
            "beside it"
        )
    (name,) = judging
    if own.external_plugins is not None and name not in (_ACCURACY, *RULES):
        return RewardConfig(plugin=f"{own.external_plugins}:{name}", format_gate=gate)
    rule = "maths" if name == _ACCURACY else name
    if rule not in RULES:
        raise UserError(
            f"--reward_funcs {name} is none of accuracy, {', '.join(RULES)}; a reward of your own is in a file, "
            "--external_plugins FILE.py"
        )
    return RewardConfig(rule=rule, format_gate=gate)


def prepare(
    arguments: RlhfArguments,
    given: frozenset[str],
    data: DataConfig,
    folder_of: Callable[[RlhfArguments, time.struct_time], tuple[str, str]],
) -> Experiment:
    """Return the experiment of the arguments. Every process must call it.

    Args:
      data: of the arguments.
      folder_of: returns (root, name) of the run's folder.

    Raises:
      UserError: completions of a step that are no whole groups; arguments that exclude one another.
    """
    from jvlm.swift.batches import Batches
    from jvlm.swift.experiment import Facts, experiment_of

    optimization, own = arguments.optimization, arguments.grpo
    processor, text = language_model.source_of(arguments.model.model)
    count, devices = len(Examples.open(data)), jax.device_count()
    per_step = optimization.per_device_train_batch_size * devices
    accumulation = optimization.gradient_accumulation_steps or math.ceil(max(16, own.num_generations) / per_step)
    completions = per_step * accumulation
    if completions % own.num_generations:
        raise UserError(
            f"{completions} answers of a step (--per_device_train_batch_size x {devices} devices x "
            f"--gradient_accumulation_steps {accumulation}) are no whole groups of --num_generations "
            f"{own.num_generations}"
        )
    groups = completions // own.num_generations
    steps = optimization.max_steps
    if steps <= 0:
        steps = math.ceil(optimization.num_train_epochs * count / groups)
    data = dataclasses.replace(data, batch_size=devices, curves="off", preference="none", on_too_long="drop")
    root, name = hosts.broadcast_from_0(folder_of(arguments, time.localtime()))
    batches = Batches(data, 1, completions)
    facts = Facts(processor.model, processor.config, batches, count, math.ceil(count / groups), root, name, text)
    made = experiment_of(arguments, facts, given)
    return dataclasses.replace(made, steps=steps, task=task_of(arguments, groups, devices))
