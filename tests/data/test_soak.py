"""Many examples of which some are damaged: each counted once, whoever reads them, and after a kill."""

import json

import pytest

from tools import soak_data

EXAMPLES = 3000


def read_here(files, log, batches=None):
    """What threads of this process read."""
    soak_data.read(files, log, 0, batches)
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_damaged_examples_are_counted_exactly_and_batches_are_the_same_for_all_readers(tmp_path):
    file = soak_data.write_examples(tmp_path, EXAMPLES)
    runs = {
        "threads": soak_data.run([file], tmp_path / "threads.log", 0),
        "killed processes": soak_data.run([file], tmp_path / "killed.log", 2, kill_at=6),
    }
    expected = [batch["digest"] for batch in runs["threads"]]
    assert len(expected) > 15
    assert len(soak_data.damaged(EXAMPLES)) == 30
    for name, batches in runs.items():
        assert [name, *soak_data.problems(batches, EXAMPLES, expected)] == [name]


@pytest.mark.slow
def test_a_mixture_with_a_schedule_goes_on_after_a_kill_as_if_unbroken(tmp_path):
    files = [soak_data.write_examples(tmp_path, 700, "most"), soak_data.write_examples(tmp_path, 90, "few")]
    unbroken = read_here(files, tmp_path / "threads.log", batches=15)
    killed = soak_data.run(files, tmp_path / "killed.log", 1, kill_at=7, batches=15)
    for key in ("digest", "conversations", "rejected"):
        assert [batch[key] for batch in killed] == [batch[key] for batch in unbroken]
    assert len({batch["digest"] for batch in unbroken}) == 15


@pytest.mark.slow
def test_hosts_that_are_killed_and_come_back_in_other_numbers_read_each_sequence_once(tmp_path):
    """Two hosts, then one; 1 % of the examples are damaged."""
    file = soak_data.write_examples(tmp_path, 1500)
    alone = read_here([file], tmp_path / "alone.log")
    found = soak_data.run_hosts([file], tmp_path, [2, 1], kill_at=5)
    expected = sorted(one for batch in alone for one in batch["sequences"])
    assert len(set(expected)) == len(expected) > 30
    assert sorted(one for batch in found for one in batch["sequences"]) == expected
    assert sum(batch["conversations"] for batch in found) == 1500 - 15
    rejected = sorted(number for batch in found for number in batch["rejected"])
    assert rejected == [index + 1 for index in soak_data.damaged(1500)]


@pytest.mark.slow
def test_a_mixture_read_by_hosts_that_are_killed_draws_what_one_host_draws(tmp_path):
    """By one host, then two; other numbers are in training/test_mixtures.py."""
    files = [soak_data.write_examples(tmp_path, 700, "most"), soak_data.write_examples(tmp_path, 90, "few")]
    folder = tmp_path / "hosts"
    folder.mkdir()
    found = soak_data.run_hosts(files, folder, [1, 2], kill_at=5, batches=6)
    # one host alone reads further than all of them together
    alone = read_here(files, tmp_path / "alone.log", batches=40)
    expected = {one for batch in alone for one in batch["sequences"]}
    sequences = [one for batch in found for one in batch["sequences"]]
    assert len(set(sequences)) == len(sequences) > 40
    assert set(sequences) <= expected
