"""Reward functions in the forms of five libraries, and what is said of those that are wrong."""

from __future__ import annotations

import sys
import textwrap

import pytest

from jvlm.errors import UserError
from jvlm.rl.rewards.plugins import PluginReward
from jvlm.rl.rewards.router import Route, Router
from jvlm.rl.rewards.rules import RuleReward
from jvlm.rl.rewards.source import RewardItem

ASKED = ({"role": "user", "content": "How many?"},)
ITEMS = [
    RewardItem("a", "mine", "7", gold="7", messages=ASKED, columns={"hard": True}, token_ids=(4, 5)),
    RewardItem("b", "mine", "8", gold="7", messages=ASKED, columns={"hard": False}, token_ids=(6,)),
]

TRL = """
def reward(prompts, completions, completion_ids, hard, **columns):
    assert prompts[0][0]["content"] == "How many?" and completion_ids == [[4, 5], [6]] and hard == [True, False]
    texts = [completion[0]["content"] for completion in completions]
    return [float(text == gold) for text, gold in zip(texts, columns["ground_truth"])]
"""
TRL_ASYNC = """
async def reward(completions, answer, **columns):
    columns["log_metric"]("x", 1.0)
    return [float(c[0]["content"] == gold) for c, gold in zip(completions, answer)]
"""
SWIFT = """
from typing import List
from swift.rewards import ORM, orms

class Mine(ORM):
    def __call__(self, completions, solution, **kwargs) -> List[float]:
        assert kwargs["messages"][0][-1]["content"] == "7"
        return [1.0 if text == gold else 0.0 for text, gold in zip(completions, solution)]

orms["mine"] = Mine
"""
SWIFT_3 = SWIFT.replace("swift.rewards", "swift.plugin")
VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "mine" and "hard" in extra_info
    return {"score": float(solution_str == ground_truth), "kind": "exact"}
"""
EASY_R1 = """
def compute_score(reward_inputs, format_weight=0.1):
    assert reward_inputs[0]["response_length"] == 2
    return [{"overall": float(one["response"] == one["ground_truth"]), "format": 1.0} for one in reward_inputs]
"""
EASY_R1_SINGLE = """
def compute_score(reward_input):
    return {"overall": float(reward_input["response"] == reward_input["ground_truth"])}
"""
OPENRLHF = """
import numpy as np

def reward_func(queries, prompts, labels, **kwargs):
    answers = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    values = np.array([float(answer == label) for answer, label in zip(answers, labels)])
    return {"rewards": values, "scores": values, "extra_logs": {}}
"""


def _plugin(tmp_path, code, name=""):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(code))
    return PluginReward(f"{file}:{name}" if name else str(file))


@pytest.mark.parametrize(
    ("form", "code", "name"),
    [
        ("TRL", TRL, "reward"),
        ("TRL", TRL_ASYNC, "reward"),
        ("ms-swift", SWIFT, "mine"),
        ("ms-swift", SWIFT, "Mine"),
        ("ms-swift", SWIFT_3, ""),
        ("verl", VERL, "compute_score"),
        ("EasyR1", EASY_R1, ""),
        ("EasyR1", EASY_R1_SINGLE, ""),
        ("OpenRLHF", OPENRLHF, ""),
    ],
)
def test_a_function_is_called_as_its_library_calls_it(tmp_path, form, code, name):
    plugin = _plugin(tmp_path, code, name)
    assert [score.value for score in plugin.scores(ITEMS)] == [1, 0]
    assert plugin.form == form
    assert plugin.describe()["version"]
    assert "swift" not in sys.modules


def test_a_function_is_found_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(VERL)
    monkeypatch.syspath_prepend(tmp_path)
    assert PluginReward("my_rewards:compute_score").scores(ITEMS)[0].parsed == {"score": 1.0, "kind": "exact"}


def test_a_function_of_texts_gets_texts_where_there_is_no_conversation(tmp_path):
    plugin = _plugin(tmp_path, "def f(completions, **_):\n    return [float(c == '7') for c in completions]", "f")
    assert plugin.scores([RewardItem("a", "mine", "7")])[0].value == 1


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("[1.0]", r"was asked for 2 rewards and returned 1 values"),
        ("1.0", r"returned a float"),
        ("[0.5, float('nan')]", r"item b: the reward nan"),
        ("[0.5, float('inf')]", r"item b: the reward inf"),
        ("[1.5, 0]", r"item a: the reward 1.5 is not a number from 0 to 1"),
        ("[-0.1, 0]", r"item a: the reward -0.1"),
        ("['1', 0]", r"item a: the reward '1'"),
        ("[1 / 0, 0]", r"raised ZeroDivisionError"),
        ("[{'value': 1}, 0]", r"neither 'score' nor 'overall'"),
    ],
)
def test_what_a_function_does_wrong_is_told_with_its_name(tmp_path, body, match):
    plugin = _plugin(tmp_path, f"def f(completions, **_):\n    return {body}", "f")
    with pytest.raises(UserError, match=rf"mine\.py:f.*{match}"):
        plugin.scores(ITEMS)


def test_none_is_a_missing_reward_and_never_zero(tmp_path):
    plugin = _plugin(tmp_path, "def f(completions, **_):\n    return [None, 0.0]", "f")
    assert [score.value for score in plugin.scores(ITEMS)] == [None, 0]


def test_a_function_that_fails_leaves_other_tasks_alone(tmp_path):
    plugin = _plugin(tmp_path, "def f(completions, **_):\n    raise KeyError('x')", "f")
    with Router({"mine": Route(plugin), "count": Route(RuleReward("count"))}) as router:
        scores = router.scores([*ITEMS, RewardItem("c", "count", "3", gold=3)])
    assert [(score.value, score.reason) for score in scores] == [(None, "service_error")] * 2 + [(1, "ok")]
    assert "KeyError" in scores[0].parsed


@pytest.mark.parametrize(
    ("code", "name", "match"),
    [
        ("x = 1", "f", "has no f; it has nothing that can be called"),
        ("def g(completions, **_): ...", "f", "it has g"),
        ("def f(texts): ...", "f", r"takes \(texts\), the form of no known library"),
        ("import nothing_of_this_name", "f", "cannot be loaded: ModuleNotFoundError"),
        ("from swift.llm import Template", "f", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_plug_in_is_refused(tmp_path, code, name, match):
    with pytest.raises(UserError, match=match):
        _plugin(tmp_path, code, name)


def test_a_module_without_a_function_and_a_file_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="names no function"):
        PluginReward("json")
    with pytest.raises(UserError, match=r"nothing\.py cannot be read"):
        PluginReward(str(tmp_path / "nothing.py:f"))
