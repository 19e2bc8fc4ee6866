"""Twenty kills of one run at random moments, and runs of two processes: `make soak-rl`."""

from tests.rl.test_kill import check_kills, start, write
from tests.rl.test_processes import check_two


def test_twenty_kills_change_nothing(tmp_path):
    whole = write(tmp_path / "whole", delays=False)
    assert start(whole, 60).wait(900) == 0, (whole / "output.txt").read_text()[-4000:]
    assert check_kills(whole, tmp_path / "broken", steps=60, kills=20, seed=2) == 20


def test_two_processes_repeat_their_run_and_draw_what_one_draws(whole, tmp_path):
    check_two(whole, tmp_path, 3, ["two", "late"])
