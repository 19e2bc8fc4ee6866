"""Twenty kills of one run at random moments: `make soak-rl`."""

from tests.rl.test_kill import check_kills


def test_twenty_kills_change_nothing(tmp_path):
    assert check_kills(tmp_path, steps=60, kills=20, seed=2) == 20
