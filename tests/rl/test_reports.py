"""What went wrong in other programs, as tests. Of the reports that are not here, the tests are beside what they test.

| report | test |
| --- | --- |
| trl#4159 temperature of log-probabilities | test_the_trainer_has_the_engines_log_probabilities_at_a_temperature |
| trl#6789, PR 7269 top-p on one side | test_nothing_is_cut_from_the_distribution |
| trl#6369, PR 6439 masked tokens in the denominator | test_losses.py: test_masked_answers_leave_the_denominator |
| trl#7206, PR 7249 means of micro-batches | test_losses.py: test_micro_batches_and_other_orders_of_tokens_add_up |
| trl PR 7039 one of several stop tokens known | test_replay.py: test_every_step_is_stored... |
| trl PR 4970, 2708 masks from values of tokens | test_every_sampled_token_is_in_the_loss_whatever_its_value |
| trl#6533 a list of one reward | test_rollouts.py: test_a_judge_that_returns_fewer_rewards_is_refused |
| trl#6401 prompts that are processed twice | test_what_is_trained_on_is_the_prompt_that_was_answered |
| verl PR 5635 a limit that only the main thread may set | scoring/test_maths.py: test_golden |
| verl PR 5839 no limit at all | scoring/test_maths.py: test_answers_that_never_end_cost... |
| AReaL PR 1426 workers that never come back | the same |
| AReaL#1388, PR 1345 ages after a restart | test_run.py: test_the_reward_rises_and_a_restart_repeats_the_run |
| AReaL PR 1569 version read too late | test_replay.py: test_every_step_is_stored_with_what_the_log_says_of_it |
| AReaL#548 slow rewards are 0 | rewards/test_service.py: test_a_slow_server_makes_rewards_missing_at_the_deadline |
| verl#6780, #4449 a step behind | test_run.py: test_the_reward_rises_and_a_restart_repeats_the_run |
| verl#6592 sizes of another model's patches | test_prompts_that_do_not_fit_are_refused_and_never_cut |
| EasyR1#267, #175 prompts cut in an image | the same |
| ms-swift PR 9060, #9787 weights that change by themselves | test_without_a_learning_rate_nothing_changes |
| ms-swift#3780 answers that are all alike | test_no_two_answers_of_a_run_are_drawn_alike |
| VLM-R1#44, #198 pictures that arrive as noise | test_samples.py; the first step has a page |
| Rex-Omni#146 boxes given twice | rewards/test_rules.py: test_several_guesses_never_beat_the_mean_of_each |
| OpenRLHF#1270, PR 1239 groups without a spread | test_a_group_is_useful_by_the_spread_of_its_raw_rewards |
| OpenRLHF#1120; PR 1140 which reward scored | test_replay.py: test_every_step_is_stored_with_what_the_log_says_of_it |
| NeMo-RL#2431, PR 3794 shaped rewards choose groups | test_a_group_is_useful_by_the_spread_of_its_raw_rewards |
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError
from jvlm.rl import run
from jvlm.rl.config import AdvantageConfig, RolloutConfig
from jvlm.rl.log_probs import MOST_BANNED
from jvlm.rl.losses import PolicyLoss
from jvlm.rl.packing import SampledAnswer, SampledGroup, Shape, packed_answers
from jvlm.rl.prompts import Limits, Prompts
from jvlm.rl.records import GroupRecord
from jvlm.rl.rewards import config as reward_config
from jvlm.rl.rollouts import Rollouts, is_useful
from jvlm.rl.weighing import weigh
from jvlm.training.config import ValidationConfig
from tests.rl.support import policy_experiment, write_prompts
from tests.rl.test_step_log import answer

NOTHING_BANNED = np.full((2, MOST_BANNED), -1, np.int32)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "run" / "logging.jsonl").read_text().splitlines()]


def group(*rewards, **fields):
    answers = tuple(answer(reward, range(1 + n), **fields) for n, reward in enumerate(rewards))
    return GroupRecord(0, 0, "a", "boxes", 0, False, 9, answers)


def test_nothing_is_cut_from_the_distribution():
    assert not {field.name for field in dataclasses.fields(RolloutConfig)} & {"top_p", "top_k", "min_p"}
    sampling = Rollouts.sampling(SimpleNamespace(config=RolloutConfig(temperature=0.6), _seed=1), 5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.6, 1, 0, 0)
    assert (sampling.repetition_penalty, sampling.logit_bias, sampling.allowed_token_ids) == (1, {}, None)


def test_no_two_answers_of_a_run_are_drawn_alike():
    config = RolloutConfig(answers=8)
    edge = 2**31 // 8
    serials = [*range(50), *range(edge - 20, edge + 50), 3 * edge + 1]
    drawn = set()
    for serial in serials:
        sampling = Rollouts.sampling(SimpleNamespace(config=config, _seed=2**32 - 1), serial)
        drawn |= {(sampling.seed, sampling.number + index) for index in range(sampling.n)}
    assert len(drawn) == 8 * len(serials)


def test_a_group_is_useful_by_the_spread_of_its_raw_rewards():
    assert not is_useful(group(0.7, 0.7 + 1e-7, 0.7))  # their standard deviation is not 0
    assert not is_useful(group(None, 0.7))
    assert is_useful(group(None, 0.7, 0.2))
    lengths = group(0.0, 0.0, 0.0)
    loss = PolicyLoss()
    config = AdvantageConfig(repetition_weight=1.0, overlong_margin=2)
    assert not is_useful(lengths)  # though the shaped ones differ
    assert len(set(weigh([lengths], config, loss, longest=3).shaped)) == 3
    # an answer whose reward is missing leaves mean and spread of its group
    with_missing, without = group(1.0, None, 0.0, 0.5), group(1.0, 0.0, 0.5)
    values = weigh([with_missing], AdvantageConfig(), loss, longest=9)
    np.testing.assert_allclose(np.delete(values.advantages, 1), weigh([without], AdvantageConfig(), loss, 9).advantages)
    assert values.advantages[1] == values.weights[1] == 0


@pytest.fixture(scope="module")
def pictured(tiny, tmp_path_factory):
    """A prompt with two pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (112, 56)), ("b.png", (56, 84))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / name)
    message = {"role": "user", "content": "<image><image>which is red?"}
    return {"messages": [message], "images": [str(folder / "a.png"), str(folder / "b.png")]}


def packed(tiny, example, answers):
    sampled = [SampledAnswer(tokens, [-0.5] * len(tokens), 1.0, 0.25) for tokens in answers]
    images = tiny.processor.image_processor
    shape = Shape(1, 512, 512, None, None, images.patch_values, tiny.processor.model.encoder.position_values)
    (batch,) = packed_answers([SampledGroup(example, sampled)], shape, NOTHING_BANNED)
    return batch


def test_every_sampled_token_is_in_the_loss_whatever_its_value(tiny, pictured):
    """Padding, ends of turns and tokens of the prompt among them: masks go by place."""
    example = tiny.processor.encode(pictured, generation_prompt=True)
    end = int(tiny.processor.tokenizer.eos_token_id)
    answers = [(0, 5, 0, end), (end, end, 5), (7,)]
    batch = packed(tiny, example, answers).policy
    weights, tokens = batch.weights[0], batch.packed.tokens[0]
    where = np.flatnonzero(weights)
    assert len(where) == sum(map(len, answers))
    assert tokens[where + 1].tolist() == [token for one in answers for token in one]
    assert batch.is_first[0].sum() == len(answers)


def test_what_is_trained_on_is_the_prompt_that_was_answered(tiny, pictured):
    """Beside the conversation with the answer as a user would give it: tokens, positions, pictures once."""
    example = tiny.processor.encode(pictured, generation_prompt=True)
    text = "the first one"
    tokens = [int(token) for token in tiny.processor.tokenizer(text, add_special_tokens=False)["input_ids"]]
    batch = packed(tiny, example, [tokens, tokens[:1]]).policy.packed
    whole = tiny.processor.encode(
        {**pictured, "messages": [*pictured["messages"], {"role": "assistant", "content": text}]}
    )
    first = batch.segment_ids[0] == 1
    length = example.length + len(tokens)
    assert first.sum() == length
    np.testing.assert_array_equal(batch.tokens[0][first], whole.tokens[:length])
    np.testing.assert_array_equal(batch.positions[0][first], whole.positions[:length])
    np.testing.assert_array_equal(batch.vision_index[0][first], whole.vision_index[:length])
    np.testing.assert_array_equal(batch.patches[0][: whole.num_patches], whole.patches)
    assert not batch.patch_segment_ids[0][whole.num_patches :].any()  # one copy for both answers


def test_prompts_that_do_not_fit_are_refused_and_never_cut(tiny, tmp_path):
    path = write_prompts(tmp_path)
    with reward_config.read(tmp_path / "rewards.json") as router:
        prompts = Prompts(tiny.processor, DataConfig(train=(str(path),)), router)
        number = next(n for n in range(len(prompts)) if prompts.question(n).conversation.images)
        whole = prompts.encode(number, Limits(10**6, 10**6, None)).example
        for limits in (
            Limits(whole.length - 1, 10**6, None),
            Limits(10**6, whole.num_patches - 1, None),
            Limits(10**6, 10**6, 4),
        ):
            with pytest.raises(ExampleError, match=r"do(es)? not fit|more than"):
                prompts.encode(number, limits)
        at_the_limit = prompts.encode(number, Limits(whole.length, whole.num_patches, None)).example
        np.testing.assert_array_equal(at_the_limit.tokens, whole.tokens)


@pytest.mark.slow
def test_the_trainer_has_the_engines_log_probabilities_at_a_temperature(tmp_path):
    """At 1 it has them in test_run.py."""
    rollout = RolloutConfig(answers=4, max_tokens=8, slots=8, page_size=32, temperature=0.6)
    run.train(policy_experiment(tmp_path, task={"rollout": rollout}, steps=1))
    (line,) = lines_of(tmp_path)
    assert line["rollout/difference"] < 2e-6
    assert abs(line["rollout/kl1"]) < 2e-6


@pytest.mark.slow
def test_without_a_learning_rate_nothing_changes(tmp_path):
    made = policy_experiment(tmp_path, steps=2)
    # 0 would freeze everything, which is refused
    optimizer = dataclasses.replace(made.optimizer, learning_rate=1e-12, encoder_lr=None, weight_decay=0.0)
    validation = ValidationConfig(data=(str(tmp_path / "prompts.jsonl"),), interval_steps=1)
    run.train(dataclasses.replace(made, optimizer=optimizer, validation=validation))
    lines = lines_of(tmp_path)
    held_out = [line["eval_reward/letters"] for line in lines if "eval_reward/letters" in line]
    assert len(held_out) == 3
    assert len(set(held_out)) == 1
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)


def test_boxes_are_rewarded_in_the_numbers_that_the_model_writes(tiny, tmp_path):
    """Pixels of the picture as the model sees it, which is larger here than it was given."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    turn = [{"role": "user", "content": "<image>where?"}, {"role": "assistant", "content": "<bbox>"}]
    record = {"messages": turn, "images": ["a.png"], "objects": {"bbox": [[10, 6, 30, 24]]}}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(record) + "\n")
    with reward_config.rules() as router:
        prompts = Prompts(tiny.processor, DataConfig(train=(str(tmp_path / "boxes.jsonl"),)), router)
        encoded = prompts.encode(0, Limits(10**6, 10**6, None))
        width, height = encoded.example.sizes[0].resized
        assert (width, height) != (40, 30)
        assert encoded.item.columns["size"] == [width, height]
        expected = [10 * width / 40, 6 * height / 30, 30 * width / 40, 24 * height / 30]
        np.testing.assert_allclose(encoded.item.gold, [expected])
        answers = [str([round(x) for x in expected]), str([2 * width, 0, 3 * width, height])]
        scores = router.scores([dataclasses.replace(encoded.item, answer=text) for text in answers])
    assert scores[0].value > 0.9
    assert scores[1].value == 0  # outside of the picture
