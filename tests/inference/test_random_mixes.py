"""Random mixes of requests: each gets what it gets alone. `make soak-serve` runs hundreds for every family."""

import pytest

from tests.inference import random_mixes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gated"])
def test_each_request_of_a_random_mix_gets_what_it_gets_alone(family):
    found = random_mixes.check(family, 12)
    assert found.answers > 20
    assert {name for name, count in found.preemptions.items() if count} == {"few pages"}
    if not random_mixes.FAMILIES[family].decoder.prefills_whole:
        assert all(found.hits.values())
    assert found.drafts["drafts"] > 0
