"""Schedules of the learning rate against transformers' of the same name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.optimization import get_scheduler

from jvlm.errors import UserError
from jvlm.training.config import OptimizerConfig
from jvlm.training.optimizer import schedules

STEPS, WARMUP, DECAY = 50, 7, 12
WSD = {"num_decay_steps": DECAY, "num_stable_steps": STEPS - WARMUP - DECAY}
CASES = [
    ({"schedule": "cosine"}, "cosine", {}),
    ({"schedule": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ({"schedule": "linear"}, "linear", {}),
    ({"schedule": "constant"}, "constant_with_warmup", {}),
    ({"schedule": "wsd"}, "warmup_stable_decay", {"num_decay_steps": DECAY}),
    *(
        (
            {"schedule": "wsd", "decay_shape": shape, "min_lr_ratio": 0.2},
            "warmup_stable_decay",
            {"num_decay_steps": DECAY, "decay_type": shape, "min_lr_ratio": 0.2},
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ),
]


def of_transformers(name: str, warmup: int, steps: int, **settings) -> list[float]:
    """The learning rate of each step, as a share of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=settings or None)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("settings", "name", "theirs"), CASES, ids=lambda case: str(case)[:60])
def test_a_schedule_is_transformers_without_its_first_step_that_changes_nothing(settings, name, theirs):
    config = OptimizerConfig(warmup_steps=WARMUP, decay_ratio=DECAY / STEPS, **settings)
    found = [float(schedules.factor(config, STEPS)(step)) for step in range(STEPS)]
    expected = of_transformers(name, WARMUP + 1, STEPS + 1, **theirs)
    if name == "warmup_stable_decay" and "min_lr_ratio" in theirs:  # whose warm-up begins at that rate
        found, expected = found[WARMUP:], expected[WARMUP:]
    else:
        assert expected[0] == 0.0
    np.testing.assert_allclose(found, expected[1:], atol=2e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_ratio=0.0)
    assert float(schedules.factor(config, STEPS)(0)) == 1.0


def test_warm_up_is_a_share_of_the_steps_or_their_number():
    assert OptimizerConfig(warmup_ratio=0.1).warmup(200) == 20
    assert OptimizerConfig(warmup_ratio=0.1, warmup_steps=3).warmup(200) == 3
    with pytest.raises(UserError, match=r"optimizer.warmup_steps must be at least 0, got -1"):
        OptimizerConfig(warmup_steps=-1)
    with pytest.raises(UserError, match=r"optimizer.schedule must be one of 'cosine', .*got 'polynomial'"):
        OptimizerConfig(schedule="polynomial")
