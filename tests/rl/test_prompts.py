"""What examples of any kind ask for, and what a right answer is."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.rl.config import RewardConfig
from jvlm.rl.prompts import Limits, Prompts
from jvlm.rl.rewards.rules import RuleReward
from jvlm.rl.run import rewards_of
from jvlm.rl.task import PolicyTask
from jvlm.training import processors
from tests.rl.support import policy_experiment, write_prompts

NO_LIMITS = Limits(10**6, 10**6, None)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return policy_experiment(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def processor(experiment):
    return processors.new(experiment)


def user(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def answered(text, answer, **fields):
    return {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
        **fields,
    }


def prompts(processor, experiment, folder, examples, config=RewardConfig(), **changes):
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    data = dataclasses.replace(experiment.data, train=(str(path),), **changes)
    with rewards_of(PolicyTask(rewards=config)) as rewards:
        return Prompts(processor, data, rewards, task=config.task)


def items(found):
    return [found.encode(number, NO_LIMITS).item for number in range(len(found))]


def test_references_of_their_own_and_answers(processor, experiment, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    box = {"ref": [], "bbox": [[16, 8, 48, 40]]}
    asked = [
        user("how many?", task="count", gold=3),
        user("2 + 2?", data_source="maths", solution="4"),
        answered("<image>where is the shape?", "<bbox>", images=["p.png"], objects=box),
        answered("what color is it?", "red"),
    ]
    found = items(prompts(processor, experiment, tmp_path, asked))
    assert [(item.task, item.gold) for item in found[:2]] == [("count", 3), ("maths", "4")]
    assert (found[3].task, found[3].gold) == ("text", "red")
    where = found[2]
    assert where.task == "boxes"
    width, height = where.columns["size"]
    (gold,) = where.gold
    assert [gold[0] / width, gold[1] / height, gold[2] / width, gold[3] / height] == pytest.approx(
        [0.25, 0.125, 0.75, 0.625], abs=0.02
    )
    assert RuleReward("boxes").scores([dataclasses.replace(where, answer=json.dumps([list(gold)]))])[0].value == 1
    assert [message["role"] for message in where.messages] == ["user"]


def test_examples_that_cannot_be_asked_are_listed_or_stop_the_run(processor, experiment, tmp_path):
    asked = [user("how many?", task="count", gold=3), user("how many?", task="count", gold="many"), user("and?")]
    with pytest.raises(ExampleError, match="line 2"):
        prompts(processor, experiment, tmp_path, asked)
    found = prompts(processor, experiment, tmp_path, asked, on_bad_example="skip", max_bad_fraction=1.0)
    assert len(found) == 1
    assert [example.number for example in found.rejected] == [2, 3]
    with pytest.raises(UserError, match="2 of 3 examples cannot be asked"):
        prompts(processor, experiment, tmp_path, asked, on_bad_example="skip")


def test_a_task_without_a_reward_is_refused(processor, experiment, tmp_path):
    with pytest.raises(ExampleError, match="'riddle' has no reward"):
        prompts(processor, experiment, tmp_path, [user("what am I?", task="riddle", gold="a")])


def test_one_reward_judges_all(processor, experiment, tmp_path):
    write_prompts(tmp_path)
    asked = [user("how many?", gold="two"), user("what am I?", task="riddle", gold="a")]
    config = RewardConfig(plugin=f"{tmp_path / 'letters.py'}:reward")
    found = prompts(processor, experiment, tmp_path, asked, config)
    with rewards_of(PolicyTask(rewards=config)) as rewards:
        answers = [dataclasses.replace(item, answer="ab12" * 4) for item in items(found)]
        assert [score.value for score in rewards.scores(answers)] == [0.5, 0.5]
        assert rewards.describe()["*"]["format_gate"] is False


def test_a_prompt_that_does_not_fit_is_named(processor, experiment, tmp_path):
    found = prompts(processor, experiment, tmp_path, [user("how many? " * 50, task="count", gold=3)])
    with pytest.raises(ExampleError, match="tokens do not fit 20"):
        found.encode(0, Limits(20, 100, None))
