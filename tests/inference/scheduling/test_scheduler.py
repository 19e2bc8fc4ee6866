"""The scheduler against a device that notices every wrong place, and against answers computed alone."""

import dataclasses
import itertools
import random

import numpy as np
import pytest

from jvlm.errors import UserError
from jvlm.inference.scheduling.config import SchedulerConfig
from jvlm.inference.scheduling.estimates import Pace, Prompts
from jvlm.inference.scheduling.plans import Decode, Encode, Prefill
from tests.inference.scheduling.device import END, Device, alone, audit, picture, spec

SMALL = {
    "num_pages": 40,
    "page_size": 4,
    "max_slots": 6,
    "max_length": 96,
    "prefill_tokens": (16,),
    "prefill_chunks": 3,
    "feature_slots": 40,
    "encode_patches": 64,
    "prefill_past_pages": 30,
}


def device(lag: int = 0, **changes) -> Device:
    return Device(SchedulerConfig(**(SMALL | changes)), lag)


def texts(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(4) for _ in range(rng.randint(1, most))]


def random_spec(rng: random.Random, name: str, **fields):
    """A prompt that often begins like others, with pictures that others have too."""
    parts = [1, 2, 3, 1, 2] if rng.random() < 0.6 else []
    for _ in range(rng.randint(0, 2)):
        shape = rng.choice("ab")
        parts.append(picture(f"{rng.randrange(4)}{shape}", 10 if shape == "a" else 6))
        parts += texts(rng, 6)
    parts += texts(rng, 12)
    fields = {
        "max_tokens": rng.randint(1, 40),
        "n": rng.choice((1, 1, 1, 2, 3)),
        "priority": rng.choice((0, 0, 0, 1)),
        "key": rng.choice("xyz"),
        "salt": rng.choice(("", "", "s")),
        "adapter": rng.choice((b"", b"", b"a")),
        "whole_prompt": rng.random() < 0.1,
        "needs_last_token": rng.random() < 0.1,
        "draft_tokens": rng.choice((0, 0, 4)),
    } | fields
    return spec(name, parts, **fields)


def check_answers(done: Device, aborted: set[str] = frozenset()) -> None:
    for (name, index), sent in done.sent.items():
        expected = alone(done.specs[name], index, done.limits[name])
        if name in aborted:
            assert sent.tokens == expected[: len(sent.tokens)]
        else:
            assert sent.tokens == expected, (name, index)


def random_events(seed: int, events: int, lag: int, **changes) -> Device:
    """Requests, steps and aborts in random order, with everything checked after each; then until nothing is left."""
    rng, run = random.Random(seed), device(lag, **changes)
    alive, aborted, count = [], set(), 0
    for event in range(events):
        kind = rng.random()
        if kind < 0.12 and run.scheduler.stats().num_requests_waiting < 20:
            count += 1
            run.add(random_spec(rng, f"r{count}"))
            alive.append(f"r{count}")
        elif kind < 0.13 and alive:
            name = alive.pop(rng.randrange(len(alive)))
            if any(not sent.ended for (request, _), sent in run.sent.items() if request == name):
                aborted.add(name)
            run.abort(name)
        else:
            run.step()
        audit(run.scheduler)
        if event % 500 == 0:  # keep the books small
            check_answers_so_far(run, aborted)
            alive = [name for name in alive if any(n == name for n, _ in run.sent)]
    run.run()
    check_answers(run, aborted)
    audit(run.scheduler)
    admission = run.scheduler.admission
    assert not run.scheduler.running
    assert admission.pages.free + admission.pages.cached == admission.pages.num_pages - 1
    assert admission.features.free + admission.features.cached == admission.features.num_slots
    assert admission.slots.free == SMALL["max_slots"]
    return run


def check_answers_so_far(run: Device, aborted: set[str]) -> None:
    """Check and forget the requests that have ended."""
    for name in {name for name, _ in run.sent}:
        answers = [sent for (n, _), sent in run.sent.items() if n == name]
        if all(sent.ended for sent in answers) or (name in aborted and not run.waiting):
            for index, sent in enumerate(answers):
                expected = alone(run.specs[name], index, run.limits[name])
                assert sent.tokens == (expected[: len(sent.tokens)] if name in aborted else expected)
                del run.sent[name, index]
            del run.specs[name], run.limits[name]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_random_events_conserve_everything_and_answers_are_those_of_each_request_alone(lag):
    goal = (None, 0.05, 0.0005)[lag]
    run = random_events(lag, 2500, lag, num_pages=22, answer_ratio=0.05, tpot_goal=goal)
    stats = run.scheduler.stats()
    assert stats.num_preemptions > 3
    assert stats.prefix_cache_hits > 200
    assert stats.mm_cache_hits > 20
    assert stats.spec_decode_num_accepted_tokens > 20
    assert (stats.late_results > 0) == (lag > 0)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_forty_thousand_random_events(lag):
    random_events(100 + lag, 20_000, lag, tpot_goal=0.05 if lag else None)


@pytest.mark.parametrize("lag", [0, 1])
def test_several_tokens_in_one_plan_change_no_answer(lag):
    run = random_events(20 + lag, 1200, lag, num_pages=26, answer_ratio=0.05, decode_steps=6)
    assert run.steps == 6
    assert run.scheduler.stats().num_preemptions > 0


WIDE = {"num_pages": 400, "max_slots": 64, "prefill_tokens": (64,), "prefill_chunks": 16, "feature_slots": 800}
PROMPT, ENCODE, DECODE = 0.02, 0.005, 0.04


def seconds(plan) -> float:
    """Every plan of a kind takes as long, as on devices that compute what is padding."""
    return PROMPT if isinstance(plan, Prefill) else ENCODE if isinstance(plan, Encode) else DECODE * plan.length


def asked_at_once(goal: float | None, requests: int = 200) -> Device:
    """Requests about a picture of their own, with 12 tokens of prompt and about 5 of answer."""
    run = Device(SchedulerConfig(**(SMALL | WIDE), prefix_cache=False, tpot_goal=goal), 1, seconds)
    for number in range(requests):
        run.add(spec(f"{number}", [1, 2, picture(f"{number}", 8), number % 4, number // 4 % 4], max_tokens=12))
    run.run()
    check_answers(run)
    return run


def test_without_a_goal_slots_are_filled_and_prefills_are_full():
    run = asked_at_once(None)
    rows = [len(plan.rows) for plan in run.plans if isinstance(plan, Decode)]
    prefills = [len(plan.chunks) for plan in run.plans if isinstance(plan, Prefill)]
    tokens = sum(rows)
    # what nothing can beat: full prefills, encodes of two pictures, and decode steps of all slots
    least = 200 / 5 * PROMPT + 200 / 2 * ENCODE + tokens / 64 * DECODE
    assert run.clock < 1.35 * least
    assert np.mean(prefills) > 4
    assert np.mean(rows) > 0.6 * 64
    # with a goal that this device cannot keep, answers do not stand still, which takes its time
    assert run.clock < 0.7 * asked_at_once(0.01).clock


@pytest.mark.parametrize("goal", [0.01, 0.05, 0.1])
def test_a_token_takes_as_long_as_the_goal_or_twice_as_long_as_alone(goal):
    run, between = asked_at_once(goal), 0.0
    longest = max(PROMPT + ENCODE, DECODE)
    for plan in run.plans[12:]:  # the first ones are measured
        if isinstance(plan, Decode):
            assert between <= 2 * longest
            between = 0.0
        else:
            between += seconds(plan)


def test_prompts_that_are_as_much_as_a_prefill_takes_of_anything_are_due_at_once():
    pace = Pace(SchedulerConfig(**SMALL))
    for kind, taken in (("encode", 5.0), ("prefill", 0.1), ("decode", 0.02)):
        pace.took(kind, taken)
    few = Prompts(tokens=1, waiting=4, decoding=4, fullness=0.2, pictures=False)
    # four fifths of a prefill would be wasted, and no encode: as much as 8 decode steps of 0.02 s without half the rows
    pace.planned("decode", 7, few)
    assert not pace.prompts_are_due(few)
    pace.planned("decode", 2, few)
    assert pace.prompts_are_due(few)
    assert not pace.prompts_are_due(dataclasses.replace(few, pictures=True))
    pace.planned("prefill")
    assert not pace.prompts_are_due(few)
    assert pace.prompts_are_due(dataclasses.replace(few, fullness=1.0))


def test_prompts_of_one_long_beginning_do_not_wait_for_each_other():
    config = SMALL | WIDE | {"prefill_past_pages": 32, "prefill_tokens": (512,), "prefill_chunks": 64}
    run = Device(SchedulerConfig(**config), 1, lambda plan: 0.5 if isinstance(plan, Prefill) else 0.02)
    shared = [1, 2, 3] * 20  # 15 pages, of which a prefill reads those of two prompts
    run.add(spec("first", shared, max_tokens=12))
    run.run()
    for number in range(8):
        run.add(spec(f"{number}", [*shared, 0, number % 4, number // 4], max_tokens=30))
    began = len(run.plans)
    run.run()
    check_answers(run)
    prefills = [i for i, plan in enumerate(run.plans[began:]) if isinstance(plan, Prefill)]
    assert len(prefills) == 4
    assert prefills[-1] - prefills[0] < 16


def test_a_plan_draws_as_many_tokens_as_its_seconds_allow_and_one_where_the_host_decides():
    pace = Pace(SchedulerConfig(**SMALL, decode_steps=16, decode_seconds=0.01))
    assert pace.plan_steps(None) == 1
    for seconds, steps in ((0.0001, 16), (0.002, 5), (0.05, 1)):
        for _ in range(5):
            pace.took("decode", seconds)
        assert pace.plan_steps(None) == steps
    run = device(decode_steps=6)
    run.add(spec("free", [1, 2], max_tokens=40))
    run.run()
    assert run.steps == 6
    run = device(decode_steps=6)
    run.add(spec("free", [1, 2], max_tokens=40))
    run.add(spec("masked", [1, 3], max_tokens=40, needs_last_token=True))
    while run.scheduler.stats().num_requests_running == 2 or not run.plans:
        run.step()
    assert run.steps <= 1


@pytest.mark.parametrize("changes", [{"prefix_cache": False}, {"feature_cache": False}, {"num_pages": 60}])
def test_answers_do_not_depend_on_caches_or_on_room(changes):
    random_events(7, 800, 1, **changes)


def test_a_prefix_is_computed_once_and_one_token_always():
    run = device()
    parts = [1, 2, 3, 0, 1, 2, 3, 0]
    run.add(spec("a", parts, max_tokens=1))
    run.run()
    assert run.computed == 8
    run.add(spec("b", parts, max_tokens=1))
    run.run()
    assert run.computed == 8 + 4  # two whole pages are there, and the last is computed for its scores
    run.add(spec("c", [*parts, 1], max_tokens=1))
    run.run()
    assert run.computed == 12 + 1
    check_answers(run)


def test_an_answer_is_found_by_the_next_turn():
    run = device()
    parts, name = [1, 2, 3, 0, 1], "a"
    run.add(spec(name, parts, max_tokens=12))
    run.run()
    answer = run.sent[name, 0].tokens
    before = run.computed
    following = [*parts, *answer, 1, 1]
    run.add(spec("b", following, max_tokens=3))
    run.run()
    kept = (len(parts) + len(answer) - 1) // 4 * 4
    assert run.computed - before == len(following) - kept
    check_answers(run)


def test_the_second_question_about_a_picture_encodes_nothing_and_may_begin_inside_it():
    run = device()
    image = picture("p", 21, 60)
    run.add(spec("a", [1, 2, image, 3, 1], max_tokens=2))
    run.run()
    assert run.encoded == 1
    before = run.computed
    # a cache that keeps the first pages only: the hit ends inside the picture
    pages = run.scheduler.admission.pages
    pages.release(pages.take(pages.available - 4))
    run.add(spec("b", [1, 2, image, 2, 2], max_tokens=2))
    run.run()
    assert run.encoded == 1
    assert 0 < run.computed - before < 25
    check_answers(run)


def test_questions_about_one_picture_that_come_together_encode_it_once():
    run = device(prefix_cache=False)
    image = picture("p", 12)
    for i in range(5):
        run.add(spec(f"r{i}", [i % 4, image, 3, 1], max_tokens=2))
    run.run()
    assert run.encoded == 1
    check_answers(run)


def test_pictures_of_several_requests_are_encoded_together():
    run = device()
    for i in range(3):
        run.add(spec(f"r{i}", [1, picture(f"p{i}", 4), 3], max_tokens=2))
    run.run()
    assert [len(p.pictures) for p in run.plans if isinstance(p, Encode)] == [3]
    prefills = [p for p in run.plans if isinstance(p, Prefill)]
    assert max(len(p.chunks) for p in prefills) > 1


@pytest.mark.parametrize(
    "other",
    [
        [1, picture("q", 12), 3, 1],
        [1, picture("p", 12), 3, 1, 1],
        [1, 1, picture("p", 12), 3, 1],
        [1, picture("p", 9), picture("p", 3), 3, 1],
    ],
    ids=["other pixels", "other text behind", "elsewhere", "two with the same tokens"],
)
def test_the_same_tokens_with_other_pictures_share_only_what_is_the_same(other):
    run = device(prefill_tokens=(32,))
    run.add(spec("a", [1, picture("p", 12), 3, 1], max_tokens=3))
    run.run()
    run.add(spec("b", other, max_tokens=3))
    run.run()  # the device compares every place that is read with the request's own prompt
    check_answers(run)


def test_two_pictures_swapped_do_not_share():
    run = device()
    p, q = picture("p", 8), picture("q", 8)
    run.add(spec("a", [p, q, 1], max_tokens=3))
    run.run()
    hits = run.scheduler.stats().prefix_cache_hits
    run.add(spec("b", [q, p, 1], max_tokens=3))
    run.run()
    assert run.scheduler.stats().prefix_cache_hits == hits
    check_answers(run)


@pytest.mark.parametrize("field", [{"salt": "x"}, {"adapter": b"x"}, {"encoder_adapter": b"x"}])
def test_salts_and_adapters_share_no_page_and_no_feature_that_differs(field):
    run = device()
    parts = [1, 2, picture("p", 8), 3, 1]
    run.add(spec("a", parts, max_tokens=1))
    run.run()
    run.add(spec("b", parts, max_tokens=1, **field))
    run.run()
    assert run.scheduler.stats().prefix_cache_hits == 0
    assert run.encoded == (1 if "adapter" in field else 2)


def test_several_answers_share_one_prefill_and_copy_one_page_each_but_the_last():
    run = device()
    run.add(spec("a", [1, 2, 3, 0, 1, 2], max_tokens=5, n=4))
    run.run()
    assert run.computed == 6
    first = next(p for p in run.plans if isinstance(p, Decode))
    assert len(first.copies) == len(first.rows) - 1
    check_answers(run)


def test_positions_of_a_chunk_are_those_of_the_whole_prompt():
    run = device(prefill_tokens=(8,))
    prompt = spec("a", [1, picture("p", 21, 60), 2, 2, 1], max_tokens=4)
    run.add(prompt)
    run.run()
    chunks = [c for p in run.plans if isinstance(p, Prefill) for c in p.chunks]
    assert len(chunks) == 4
    np.testing.assert_array_equal(np.concatenate([c.positions for c in chunks]), prompt.positions)
    decodes = [p for p in run.plans if isinstance(p, Decode)]
    assert [int(p.positions[0]) for p in decodes] == [int(prompt.positions.max()) + 1 + i for i in range(len(decodes))]


def test_a_preempted_sequence_goes_on_where_it_was_and_is_kept_whole_after_three_times():
    run = device(num_pages=13, answer_ratio=0.01, feature_slots=0)
    for i in range(5):
        run.add(spec(f"r{i}", [1, 2, 3, i % 4], max_tokens=40))
    most = 0
    while run.step() or run.scheduler.has_work:
        audit(run.scheduler)
        most = max([most, *(s.preemptions for s in run.scheduler._sequences.values())])
        reserved = [s for s in run.scheduler.running if run.scheduler.admission.is_reserved(s)]
        assert all(len(s.pages) >= 4 + s.limit // 4 - 3 for s in reserved)
    assert run.scheduler.stats().num_preemptions > 3
    assert most <= 4
    check_answers(run)


def test_no_request_waits_for_ever_for_those_of_a_better_priority_or_prefix():
    run = device(max_passed=20, max_slots=2)
    shared = [1, 2, 3, 1, 2, 3, 1, 2]
    run.add(spec("first", shared, max_tokens=2))
    run.run()
    run.add(spec("late", [0, 0, 0, 0, 0], max_tokens=2, priority=5))
    for i in range(200):
        run.add(spec(f"r{i}", [*shared, i % 4], max_tokens=2))
        run.step()
        if run.sent["late", 0].tokens:
            break
    assert 0 < sum(bool(s.tokens) for (name, _), s in run.sent.items() if name != "late") <= 20 + 2 + 2
    run.run()
    check_answers(run)


def test_keys_take_turns():
    run = device(max_slots=1, prefix_cache=False)
    for i in range(6):
        run.add(spec(f"x{i}", [1, 2], max_tokens=1, key="x"))
    run.add(spec("y", [1, 2], max_tokens=1, key="y"))
    run.run()
    order = [row.request_id for p in run.plans for row in p.rows]
    assert order.index("y") <= 1


def test_the_longest_prefix_goes_first_among_few():
    run = device(max_slots=1)
    parts = [1, 2, 3, 1, 2, 3, 1, 2]
    run.add(spec("a", parts, max_tokens=1))
    run.run()
    run.add(spec("b", [3, 3, 3, 3], max_tokens=1))
    run.add(spec("c", [*parts, 1], max_tokens=1))
    run.run()
    order = [row.request_id for p in run.plans for row in p.rows]
    assert order == ["a", "c", "b"]


def test_decoding_goes_on_between_the_chunks_of_a_long_prompt():
    run = device(prefill_tokens=(8,), prefix_cache=False, tpot_goal=0.05)
    run.add(spec("short", [1, 2], max_tokens=24))
    run.step()
    run.step()
    run.add(spec("long", [1, 2, 3, 0] * 12, max_tokens=1))
    run.run()
    kinds = [type(p) for p in run.plans]
    chunks = [i for i, kind in enumerate(kinds) if kind is Prefill][1:]
    assert len(chunks) == 6
    done = next(i for i, p in enumerate(run.plans) if any(r.request_id == "short" for r in p.rows))
    ended = max(i for i, p in enumerate(run.plans) if any(r.request_id == "short" for r in p.rows))
    between = [i for i in chunks if done < i < ended]
    assert all(b - a > 1 for a, b in itertools.pairwise(between))


def test_the_slot_of_an_ended_sequence_is_not_given_before_its_late_step_was_read():
    run = device(lag=2, max_slots=1)
    for i in range(12):
        run.add(spec(f"r{i}", [1, 2, i % 4], max_tokens=20))
    run.run()
    assert run.scheduler.stats().late_results > 0
    check_answers(run)
    assert any(sent.tokens[-1] == END for sent in run.sent.values())


def test_an_abort_frees_everything_in_every_state():
    for steps in range(12):
        run = device(lag=1, prefill_tokens=(8,))
        run.add(spec("a", [1, 2, picture("p", 9), 3, 1], max_tokens=9, n=2))
        run.add(spec("b", [1, 2, 3], max_tokens=9))
        for _ in range(steps):
            run.step()
        run.abort("a")
        audit(run.scheduler)
        run.run()
        check_answers(run, {"a"})
        admission = run.scheduler.admission
        assert admission.slots.free == 6
        assert admission.pages.free + admission.pages.cached == admission.pages.num_pages - 1


def test_a_failed_plan_aborts_its_requests_and_no_others():
    for failing in range(5):
        run = device(prefill_tokens=(8,))
        run.add(spec("other", [3, 2, 1], max_tokens=15))
        run.step()
        run.add(spec("a", [1, 2, picture("p", 9), 3, 1], max_tokens=9))
        plan = None
        for _ in range(failing + 1):
            plan = run.scheduler.next()
            if any(r.request_id == "other" for r in plan.rows) or failing:
                run.waiting.append((plan, run._execute(plan)))
                run._read(*run.waiting.pop())
                plan = None
        if plan is not None:
            assert run.scheduler.fail(plan) == ["a"]
        run.run()
        audit(run.scheduler)
        check_answers(run, {"a"})


@pytest.mark.parametrize(
    ("parts", "fields", "problem"),
    [
        ([1] * 96, {}, "the prompt has 96 tokens, and a sequence may have 96"),
        ([picture("p", 3, 65)], {}, "image 1 has 65 patches, and the encoder takes 64"),
        ([picture("p", 41, 64)], {}, "image 1 has 41 vision tokens, and an encode gives at most 40"),
        ([picture("p", 21, 8), picture("q", 20, 8)], {}, "its images have 41 vision tokens, and 40 can be kept"),
        ([1], {"n": 7}, "n is 7, and at most 6 answers"),
    ],
)
def test_what_could_never_run_is_refused_at_once(parts, fields, problem):
    with pytest.raises(UserError, match=problem):
        device().add(spec("a", parts, **fields))


def test_new_weights_share_nothing_with_old_ones():
    run = device()
    parts = [1, 2, picture("p", 8), 3, 1]
    run.add(spec("a", parts, max_tokens=1))
    run.run()
    run.scheduler.forget()
    run.add(spec("b", parts, max_tokens=1))
    run.run()
    assert run.scheduler.stats().prefix_cache_hits == 0
    assert run.encoded == 2
