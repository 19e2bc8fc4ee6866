"""Where a run stands: each sequence of each window is given out once, whichever processes come, go and are killed."""

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.data.position import Progress, Share, go_on

SEQUENCES = 3  # of each window

PROCESSES = st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 7, 30]), st.lists(st.integers(0, 60)))


def advance(progress, windows, steps, used):
    """Give out up to so many sequences; list (window, number of the sequence)."""
    while steps > 0 and progress.item[0] < windows:
        window, before = progress.item
        number = max(before, progress.given)
        used.append((window, number))
        progress = dataclasses.replace(progress, given=number + 1)
        if progress.given == SEQUENCES:
            progress = dataclasses.replace(progress, done=progress.done + 1, given=0)
        steps -= 1
    return progress


@given(st.integers(1, 150), st.lists(PROCESSES, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_each_sequence_comes_once_with_any_numbers_of_processes_and_of_windows_in_a_row(windows, turns):
    used, states = [], None
    for count, run, steps in [*turns, (1, 1, [10**6])]:
        shares = [Share(index, count, run) for index in range(count)]
        processes = [Progress(share=share) if states is None else go_on(states, share) for share in shares]
        steps = (*steps, *[0] * count)
        processes = [advance(p, windows, wanted, used) for p, wanted in zip(processes, steps, strict=False)]
        states = json.loads(json.dumps([process.state() for process in reversed(processes)]))
    assert sorted(used) == [(window, number) for window in range(windows) for number in range(SEQUENCES)]


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 400))
def test_windows_are_dealt_out_in_turn_some_in_a_row(count, run, window):
    owners = [share for index in range(count) if (share := Share(index, count, run)).before(window) is not None]
    assert [owner.index for owner in owners] == [window // run % count]
    assert owners[0].window(owners[0].before(window)) == window


def test_windows_that_nobody_began_are_kept_as_ranges():
    shares = [Share(index, 4, 1000) for index in range(4)]
    states = [advance(Progress(share=share), 4000, 20, []).state() for share in shares]
    position = go_on(states, Share()).position
    assert position.num_open == 3007 - 4 * 6  # up to the window that the last has begun, without those that are done
    assert len(position.open) == 7  # two of each process; what the last left joins the rest


def test_a_checkpoint_of_single_windows_is_read():
    states = [{"next": 9, "open": [[3, 1], [7, 0]], "index": 0, "count": 1, "done": 1, "given": 0}]
    used = []
    advance(go_on(states, Share(0, 1)), 11, 100, used)
    assert used == [(w, s) for w in (7, 9, 10) for s in range(SEQUENCES)]
    again = []
    for index in range(2):
        advance(go_on(states, Share(index, 2)), 11, 100, again)
    assert sorted(again) == used
