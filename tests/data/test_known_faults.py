"""Faults that users of other libraries reported, where no test of the part itself would notice them.

docs/results/data.md names the reports and the tests of all of them.
"""

import json
import re
from collections import Counter

import pytest

from jvlm.data.config import DataConfig
from jvlm.data.mixture.examples import Draws, Examples
from tests.support import ROOT

PASSES = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for name, count in (("a", 40), ("b", 20)):
        lines = (json.dumps({"text": f"{name}{number}"}) + "\n" for number in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def drawn(*patterns, passes=PASSES, **fields):
    """Return the files and numbers of the examples of each pass."""
    config = DataConfig(train=patterns, **fields)
    draws = Draws(Examples.open(config), config, seed=5, passes=passes)
    size = len(draws) // passes
    found = [(draw.origin.file[-7:-6], draw.origin.number) for draw in map(draws.__getitem__, range(len(draws)))]
    return [found[at : at + size] for at in range(0, len(found), size)]


@pytest.mark.parametrize("shuffle", ["global", "blocks", "none"])
def test_no_pass_over_a_part_of_a_file_gives_what_is_not_in_it(files, shuffle):
    """grain#1200: after shuffle, slice and repeat, later passes leave the slice."""
    first, *later = drawn(f"{files}/a.jsonl#7", shuffle=shuffle)
    assert len(set(first)) == 7
    assert all(sorted(one) == sorted(first) for one in later)


def test_each_pass_has_an_order_of_its_own_and_the_first_does_not_depend_on_how_many_there_are(files):
    """LlamaFactory#10672: one order for all epochs; maxtext#2543: that of the first changes with their number."""
    passes = drawn(f"{files}/a.jsonl")
    assert len({tuple(one) for one in passes}) == PASSES
    assert drawn(f"{files}/a.jsonl", passes=1) == passes[:1]


def test_files_are_mixed_from_the_start_and_none_is_repeated_or_cut(files):
    """ms-swift#6168 reads one file after the other; LlamaFactory#9121 ends with the smaller or repeats it."""
    for one in drawn(f"{files}/a.jsonl", f"{files}/b.jsonl"):
        assert Counter(name for name, _ in one) == {"a": 40, "b": 20}
        assert len(set(one)) == 60
        assert 3 <= sum(name == "b" for name, _ in one[:30]) <= 17


def test_each_report_of_the_table_names_files_of_tests_that_are_there():
    page = (ROOT / "docs/results/data.md").read_text().partition("## Faults that users")[2]
    rows = [line.split("|")[1:4] for line in page.splitlines() if "#" in line.partition("|")[2].partition("|")[0]]
    assert len(rows) >= 32
    for report, _, tests in rows:
        files = re.findall(r"`([\w/]+\.py)`", tests)
        assert files, report
        assert all("\ndef test_" in (ROOT / "tests" / file).read_text() for file in files), report
