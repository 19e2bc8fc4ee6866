"""Prompts and groups are a function of recorded state: of no timing, restart or number of groups started too many."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jvlm.errors import UserError
from jvlm.rl.prompt_stream import Outcome, PromptStream, PromptStreamConfig
from jvlm.rl.selection import Selection, SelectionConfig
from jvlm.rl.shaping import repetition, soft_overlong

CONFIG = PromptStreamConfig(easy_share=0.3, drop_hard_after=2)
GROUPS = 6


def _outcome(serial, example):
    """What becomes of a group: a function of its number and example, as it is of answers that are drawn by number."""
    kind = random.Random(f"{serial}/{example}").random()
    return Outcome(perfect=kind < 0.25, hopeless=kind > 0.85), 0.25 <= kind <= 0.85


def _step(stream, draw, config=SelectionConfig(GROUPS)):
    """One step with groups that end in a random order; returns the (serial, example) that it trains on."""
    selection, running, outcomes = Selection(config, stream.serial), [], {}
    while (found := selection.selected()) is None:
        slots = draw.randint(1, 9)
        while len(running) < slots and selection.wants_more():
            running.append(selection.start())
        serial = running.pop(draw.randrange(len(running)))
        outcomes[serial], useful = _outcome(serial, stream.prompt(serial).example)
        selection.judge(serial, useful)
    trained = [(serial, stream.prompt(serial).example) for serial in found]
    stream.finish_step(found[-1], outcomes)
    return trained


def _run(steps, seed, *, restart=False):
    stream, draw, trained = PromptStream(23, 5, CONFIG), random.Random(seed), []
    for _ in range(steps):
        trained.append(_step(stream, draw))
        if restart:  # as after a kill: only what was saved is left
            stream = PromptStream(23, 5, CONFIG, json.loads(json.dumps(stream.state())))
    return trained, stream.state()


def test_the_trained_groups_do_not_depend_on_timing_or_restarts():
    first = _run(12, 0)
    assert len({example for step in first[0] for _, example in step}) > 8
    assert first[1]["epoch"] >= 2
    for seed in range(1, 4):
        assert _run(12, seed) == first
    assert _run(12, 9, restart=True) == first


def test_groups_are_taken_by_number_and_not_by_the_end_of_their_answers():
    selection = Selection(SelectionConfig(2), 10)
    serials = [selection.start() for _ in range(4)]
    assert serials == [10, 11, 12, 13]
    selection.judge(13, True)
    selection.judge(12, True)
    selection.judge(11, False)
    assert selection.selected() is None  # 10 may still be useful
    selection.judge(10, True)
    assert selection.selected() == [10, 12]


def test_more_groups_are_started_where_fewer_are_useful():
    def started(useful_of_ten):
        selection = Selection(SelectionConfig(40), 0, judged=(1000, 100 * useful_of_ten))
        while selection.selected() is None:
            while selection.wants_more():
                selection.start()
            serial = selection.judged[0] - 1000
            selection.judge(serial, serial % 10 < useful_of_ten)
        return selection.started

    assert started(9) < 60
    assert 120 < started(3) < 180


def test_engines_are_held_back_by_rewards_and_by_the_cap():
    selection = Selection(SelectionConfig(2, most_started=2), 0)
    assert not selection.wants_more(waiting_for_rewards=4)
    for serial in range(4):
        selection.start()
        selection.judge(serial, serial == 3)
    assert not selection.wants_more()
    assert selection.selected() == [3]


def test_a_step_may_find_no_useful_group():
    selection = Selection(SelectionConfig(1, most_started=2), 0)
    for _ in range(2):
        selection.judge(selection.start(), False)
    assert selection.selected() == []


def test_without_easy_prompts_every_epoch_is_a_permutation():
    stream = PromptStream(7, 1, PromptStreamConfig(easy_share=0.0))
    drawn = [stream.prompt(serial).example for serial in range(21)]
    assert [sorted(drawn[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]


def test_easy_prompts_leave_the_stream_and_come_back_when_they_are_no_longer_easy():
    stream = PromptStream(5, 1, PromptStreamConfig(easy_share=1.0))
    first = stream.prompt(0).example
    stream.finish_step(0, {0: Outcome(perfect=True)})
    assert (stream.easy, stream.gone) == ([first], {first})
    assert stream.prompt(1) == stream.prompt(1)
    assert stream.prompt(1).from_pool
    stream.finish_step(1, {1: Outcome()})
    assert (stream.easy, stream.gone) == ([], set())


def test_hopeless_prompts_are_given_up_where_asked_and_an_empty_stream_says_so():
    stream = PromptStream(1, 1, PromptStreamConfig(easy_share=0.0, drop_hard_after=2))
    stream.finish_step(1, {0: Outcome(hopeless=True), 1: Outcome(hopeless=True)})
    with pytest.raises(UserError, match="all 1 prompts"):
        stream.prompt(2)


def test_other_data_is_refused():
    state = PromptStream(5, 1).state()
    with pytest.raises(UserError, match=r"5 prompts, and there are 6"):
        PromptStream(6, 1, state=state)
    with pytest.raises(UserError, match="empty"):
        PromptStream(0, 1)


def test_shaping_has_the_golden_values():
    golden = json.loads((Path(__file__).parents[1] / "golden" / "shaping.json").read_text())
    overlong = golden["soft_overlong"]
    found = [soft_overlong(length, overlong["max"], overlong["cache"]) for length in overlong["lengths"]]
    assert found == pytest.approx(overlong["penalty"])
    grams = golden["repetition_3gram"]
    assert [repetition(ids) for ids in grams["token_ids"]] == pytest.approx(grams["penalty"])
