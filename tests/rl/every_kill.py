"""Twenty kills of one run at random moments, and runs of two processes: `make soak-rl`."""

from tests.rl.test_kill import check_kills
from tests.rl.test_processes import check_two


def test_twenty_kills_change_nothing(tmp_path):
    assert check_kills(tmp_path, steps=60, kills=20, seed=2) == 20


def test_two_processes_repeat_their_run_and_draw_what_one_draws(tmp_path):
    check_two(tmp_path, 3, ["two", "late"])
