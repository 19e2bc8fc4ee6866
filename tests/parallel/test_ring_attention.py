"""Ring attention equals attention to the whole sequence, and shards travel no further than segments reach."""

from __future__ import annotations

import json
import math

import pytest

from tests.parallel.ring_on_devices import CASES
from tests.support import cpu_devices, run_python, with_compiler

FAST = ("one_row_long", "short_both_ways", "within_shards")
KERNELS = ("segment_attention_forward", "segment_attention_d_keys", "segment_attention_d_queries")
CHOSEN = [pytest.param(FAST, id="fast"), pytest.param([*CASES], id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=CHOSEN)
def found(request):
    """Case -> (collectives, shards sent by all devices, traceback or None)."""
    code = f"from tests.parallel.ring_on_devices import main; main(*{list(request.param)!r})"
    lines = map(json.loads, run_python(code, timeout=900, **cpu_devices(8)).splitlines())
    return {name: rest for name, *rest in lines}


def test_outputs_and_gradients_are_those_of_a_mask_in_memory(found):
    assert {name: error for name, (*_, error) in found.items() if error} == {}


def test_keys_are_sent_to_neighbours_and_gathered_nowhere(found):
    for name, (listed, *_) in found.items():
        assert any(line.startswith("collective-permute over context") for line in listed), name
        if name not in ("uneven", "split_heads"):  # arguments of these are laid out first
            assert [line for line in listed if line.startswith(("all-gather", "reduce-scatter"))] == [
                "all-gather over context: 1"  # the lowest and highest segment of each shard
            ], name


def test_a_shard_travels_as_far_as_segments_reach_and_its_gradient_the_shorter_way_home(found):
    for name, (_, sent, _) in found.items():
        case = CASES[name]
        hops, devices = max(case.reach(), 1), math.prod(size for _, size in case.mesh)
        # keys in the forward and in the backward pass, gradients after each part but the last, and their way home
        assert sent == devices * case.ways * (2 * hops + min(hops, case.shards - hops)), name


@pytest.mark.slow
def test_a_tpu_computes_while_shards_travel():
    result = with_compiler("tpu-compiler", "-m", "tests.parallel.ring_on_tpu")
    assert result.returncode == 0, result.stderr[-4000:]
    parts = json.loads(result.stdout.splitlines()[-1])
    for kernel in (KERNELS[0], KERNELS[2]):  # the last of each pass
        before = [calls[: calls.index(kernel)] for calls in parts if kernel in calls]
        assert any({"collective-permute-start"} == {*names} - {*KERNELS} for names in before), (kernel, parts)
