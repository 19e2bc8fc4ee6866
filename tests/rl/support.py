"""A small policy that can learn something in a few steps: pictures, a reward that likes some letters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jvlm.rl.config import RewardConfig, RolloutConfig
from jvlm.rl.selection import SelectionConfig
from jvlm.rl.task import PolicyTask
from jvlm.training.config import Experiment
from tests.training.support import experiment, write_examples

REWARD = '''
"""The share of an answer's characters that are lower-case letters."""


def reward(completions, gold, **columns):
    texts = [one[0]["content"] for one in completions]
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 8) for text in texts]
'''


def write_prompts(folder: Path, count: int = 12) -> Path:
    """A JSONL of prompts about coloured pictures, of which some have none and some two; and how they are judged."""
    examples = [json.loads(line) for line in write_examples(folder, count).read_text().splitlines()]
    lines = [{**one, "messages": one["messages"][:1], "task": "letters", "gold": "red"} for one in examples]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "letters.py").write_text(REWARD)
    (folder / "rewards.json").write_text(json.dumps({"letters": {"plugin": "letters.py:reward"}}))
    return path


def policy_experiment(folder: Path, *, task: dict[str, Any] = {}, **changes: Any) -> Experiment:  # noqa: B006
    """The demo's experiment, small, as policy optimisation on the prompts of ``folder``."""
    path = folder / "prompts.jsonl"
    if not path.is_file():
        write_prompts(folder)
    rollout = RolloutConfig(answers=4, max_tokens=8, slots=8, page_size=32)
    rewards = RewardConfig(file=str(folder / "rewards.json"))
    policy = PolicyTask(rollout=rollout, rewards=rewards, selection=SelectionConfig(groups=4))
    made = experiment(folder, path, "--data.seq_len", "256", "--data.max_patches", "256", "--data.max_length", "128")
    optimizer = dataclasses.replace(made.optimizer, kind="adamw", learning_rate=3e-3, schedule="constant")
    return dataclasses.replace(
        made,
        **{
            "task": dataclasses.replace(policy, **task),
            "optimizer": optimizer,
            "steps": 3,
            "export": dataclasses.replace(made.export, enabled=False),
            **changes,
        },
    )
