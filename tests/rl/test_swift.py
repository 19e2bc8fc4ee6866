"""``jvlm rlhf --rlhf_type grpo``: its arguments are ms-swift's."""

from __future__ import annotations

import shlex

import pytest

from jvlm import configs
from jvlm.cli import main
from jvlm.errors import UserError
from jvlm.rl.task import PolicyTask
from jvlm.swift import grpo, saved
from jvlm.swift.arguments import RlhfArguments
from jvlm.swift.words import parse
from tests.rl.support import write_prompts


def task(line):
    words = shlex.split(f"--model DIR --rlhf_type grpo --reward_funcs accuracy {line}")
    return grpo.task_of(parse(RlhfArguments, words, "jvlm rlhf").arguments, 4)


# ms-swift's docs/source_en/Instruction/Command-line-parameters.md
@pytest.mark.parametrize(
    ("name", "default"),
    [
        *(("num_generations", 8), ("max_completion_length", 512), ("temperature", 0.9), ("epsilon", 0.2)),
        *(("epsilon_high", None), ("delta", None), ("importance_sampling_level", "token"), ("overlong_filter", False)),
        *(("advantage_estimator", "grpo"), ("scale_rewards", "auto"), ("dynamic_sample", False)),
        *(("max_resample_times", 3), ("rollout_importance_sampling_mode", None), ("reward_funcs", ())),
        *(("rollout_importance_sampling_threshold", 2.0), ("repetition_max_penalty", -1.0)),
    ],
)
def test_defaults_are_those_of_ms_swift(name, default):
    assert saved.flat(parse(RlhfArguments, [], "jvlm rlhf").arguments)[name] == default


@pytest.mark.parametrize(
    ("line", "part", "expected"),
    [
        ("", "policy_loss", {"kind": "ppo", "ratio_low": 0.8, "ratio_high": 1.2, "normalise": "sequence"}),
        ("", "policy_loss", {"kl_weight": 0.04, "correction": "none"}),
        ("--loss_type dapo --epsilon_high 0.28", "policy_loss", {"normalise": "batch", "ratio_high": 1.28}),
        ("--loss_type dr_grpo", "policy_loss", {"normalise": "constant", "constant_length": 512}),
        ("--loss_type cispo --epsilon_high 5", "policy_loss", {"kind": "cispo", "ratio_low": 0.0, "ratio_high": 5.0}),
        ("--importance_sampling_level sequence", "policy_loss", {"kind": "gspo", "normalise": "sequence"}),
        ("--rollout_importance_sampling_mode token_mask", "policy_loss", {"correction": "token_mask"}),
        ("--beta 0 --delta 4", "policy_loss", {"kl_weight": 0.0, "ratio_cap": 4.0}),
        ("", "advantage", {"estimator": "group", "eps": 1e-4, "truncated": "zero"}),
        ("--scale_rewards none --overlong_filter true", "advantage", {"estimator": "mean", "truncated": "mask"}),
        ("--advantage_estimator rloo", "advantage", {"estimator": "rloo"}),
        ("--advantage_estimator reinforce_plus_plus", "advantage", {"estimator": "reinforce++_baseline"}),
        ("", "selection", {"groups": 4, "most_started": 1.0}),
        ("--dynamic_sample true", "selection", {"most_started": 4.0}),
        ("--num_generations 16", "rollout", {"answers": 16, "temperature": 0.9, "max_tokens": 512}),
        ("", "rewards", {"rule": "maths", "format_gate": False}),
    ],
)
def test_arguments_are_a_task(line, part, expected):
    found = getattr(task(line), part)
    assert {name: getattr(found, name) for name in expected} == expected


def rewards(*names, **arguments):
    return grpo._rewards(grpo.GrpoArguments(reward_funcs=names, **arguments))


def test_rewards():
    assert rewards("boxes", "format").rule == "boxes"
    assert rewards("boxes", "format").format_gate
    assert rewards("mine", external_plugins="p.py").plugin == "p.py:mine"
    for names in ((), ("accuracy", "count"), ("mine",)):
        with pytest.raises(UserError, match="--reward_funcs"):
            rewards(*names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--top_p 0.9", "the loss is that of the whole distribution"),
        ("--loss_type sigmoid", "it is one of grpo, bnpo"),
        ("--advantage_estimator rloo --scale_rewards group", "leave --scale_rewards out"),
        ("--loss_type cispo", "--epsilon_high is the largest weight"),
    ],
)
def test_what_cannot_be_done_is_refused(line, message):
    with pytest.raises(UserError, match=message):
        task(line)


def test_the_line_is_a_config(tmp_path, tiny, capsys):
    prompts, config = write_prompts(tmp_path), tmp_path / "grpo.py"
    line = f"rlhf --rlhf_type grpo --model {tiny.folder} --dataset {prompts} --num_generations 4 --train_type full "
    line += f"--external_plugins {tmp_path / 'letters.py'} --reward_funcs reward --max_completion_length 8 "
    line += f"--write_config {config}"
    assert main(shlex.split(line)) == 0
    assert "jvlm rl " in capsys.readouterr().out
    experiment = configs.load(str(config))
    assert isinstance(experiment.task, PolicyTask)
    assert experiment.task.selection.groups == 4
    assert experiment.steps == 9  # three passes over 12 prompts
    assert experiment.data.seq_len == "auto"
