"""tools/plan.py for NVIDIA GPUs, with their compiler and no GPU."""

import functools
import json

import pytest

from jvlm.planning.chips import Topology, smaller
from tests import support

with_compiler = functools.partial(support.with_compiler, "gpu-compiler")
BFLOAT16, FLOAT32, INT32 = 2, 4, 4


@pytest.fixture(scope="module")
def found():
    """Programs that can be counted by hand, and a training step; see planned_gpus."""
    done = with_compiler("-m", "tests.tools.planned_gpus")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_products_and_collectives_count_as_often_as_their_loop_runs(found):
    known = found["known"]
    assert known["flops"] == 7 * 2 * 256 * 512 * 512
    gathered = 7 * (512 * 512 * BFLOAT16) * 3 / 4
    summed = 7 * 2 * (256 * 512 * BFLOAT16) / 2
    assert known["axis_traffic"] == {
        # of a group of four, two in each machine: each has a card of its own
        "fsdp": [{"all-gather": gathered}, 2 * 50e9, "dcn"],
        "tensor": [{"all-reduce": summed}, 450e9, "nvlink"],
    }


@pytest.mark.slow
def test_memory_traffic_is_that_of_the_turns(found):
    row, weight = 256 * 512 * BFLOAT16, 512 * 512 * BFLOAT16
    least = 7 * (weight / 4 + 2 * weight + 6 * row)  # gathered, then read; product, sum and tanh read and written
    assert least < found["known"]["hbm"] < 3 * least  # a product this small is summed in parts, in float32


@pytest.mark.slow
def test_a_program_may_have_what_jax_takes_of_a_gpu(found):
    assert found["known"]["limit"] == pytest.approx(0.75 * 141e9, rel=0.08)  # of the data sheet
    fits, needed = found["refused"]
    assert not fits
    assert needed >= 4 * 2**34  # the product of 2^17 x 2^17 in float32


@pytest.mark.slow
def test_what_a_step_stores_and_keeps_is_a_part_on_each_gpu(found):
    step = found["step"]
    stored = step["count"] * FLOAT32 / 2  # over `fsdp`; norms and biases are whole
    assert stored <= step["parameters"] < 1.1 * stored
    assert step["optimizer"] == pytest.approx(2 * step["parameters"], rel=1e-3)  # both moments, and a count of steps
    rows, tokens, patches, width, heads = 8 / 2, 128 / 4, 256 / 4, 64, 8
    # of both towers' two layers: what comes in, attention's output, and the logarithm of its sum
    kept = 2 * rows * (tokens + patches) * (2 * width * BFLOAT16 + heads * FLOAT32)
    kinds = 2 * INT32  # which attention each of the vision tower's layers has
    assert step["activations"] == kept + kinds


@pytest.mark.slow
def test_a_step_of_decoding_copies_no_matrices_together(found):
    """Queries, keys, values, output, and the MLP's three, of two layers, and the head."""
    assert found["products"] == 2 * 7 + 1


@pytest.mark.slow
def test_experts_products_are_kernels_and_not_of_every_row_with_every_expert(found):
    names = ["grouped_matmul", "grouped_matmul_outer", "grouped_matmul_transposed"]
    assert found["grouped"] == {"outside": 0, "kernels": names}


@pytest.mark.slow
def test_what_goes_over_the_same_links_is_added_up(found):
    """Over `fsdp` and over `fsdp` and `context` together, each of the machines' cards; over `context`, NVLink."""
    seconds = {"dcn": 0.0, "nvlink": 0.0}
    for network, time in found["step"]["axis_traffic"]:
        seconds[network] += time
    assert 0 < seconds["nvlink"] < seconds["dcn"]
    assert found["step"]["network"] == pytest.approx(seconds["dcn"])
    assert max(time for _, time in found["step"]["axis_traffic"]) < seconds["dcn"]


def test_the_network_between_machines_may_be_said():
    topology = smaller(Topology.parse("a100:4x8", 12.5e9))
    assert topology.chip.dcn == 12.5e9
    assert Topology.parse("a100:4x8").chip.dcn == 25e9


def test_one_machine_needs_no_second_number():
    one = Topology.parse("h100:8")
    assert (one.shape, one.chips) == ((1, 8), 8)


def test_a_missing_compiler_is_named():
    done = support.with_compiler("tpu-compiler", "tools/plan.py", "mimo_vl/stage1", "--topology", "h200:8")
    assert done.returncode == 2
    assert "no compiler for NVIDIA GPUs here: pip install" in done.stderr
