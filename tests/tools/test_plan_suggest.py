"""What tools/plan.py assumes and suggests, with a compiler whose answers are a formula."""

import types

import pytest

from jvlm import configs
from jvlm.models import vlm
from jvlm.planning import suggest
from jvlm.planning.chips import Topology
from jvlm.planning.roofline import SegmentLengths
from jvlm.units import GIB

WEIGHTS = {"none": 4.0, "dots": 3.0, "attention": 2.0, "full": 1.0}


def plan(experiment, topology, lengths):
    """Memory grows with rows for each chip, less where more is computed again; that costs speed."""
    size = WEIGHTS[experiment.model.precision.remat] * experiment.data.batch_size / topology.chips * GIB
    mesh = {"fsdp": 16, "context": 4} if experiment.parallel.context > 1 else {"fsdp": 64}
    memory = types.SimpleNamespace(peak=size)
    fits = size <= 10 * GIB
    compiled = types.SimpleNamespace(mesh=mesh, memory=memory, limit=10 * GIB, fits=fits, readable=fits, unread="")
    speed = WEIGHTS[experiment.model.precision.remat] * topology.chips
    return types.SimpleNamespace(
        topology=topology, compiled=compiled, roofline=types.SimpleNamespace(mfu=0.5, tokens_per_second=speed)
    )


@pytest.fixture(scope="module")
def found():
    experiment = configs.load("mimo_vl/stage4", ["--data.batch_size", "64"])
    first = plan(experiment, Topology.parse("v5p:4x4x4"), None)
    return suggest.search(plan, experiment, first, None, seconds=60)


def test_the_fastest_setting_that_fits_is_named(found):
    assert "Fastest bound of what fits on v5p:4x4x4: remat none." in found


def test_sequences_are_doubled_until_they_do_not_fit(found):
    assert "Largest batch tried that fits: 256 sequences." in found  # 8 GiB; 512 would be 16
    assert "| 512 sequences | 16.0 of 10.0, does not fit |" in found


def test_chips_are_halved_until_it_does_not_fit(found):
    assert "Smallest topology tried that fits: v5p:2x2x4." in found  # 8 GiB; 8 chips would be 16


def test_rules_are_tried_that_come_to_something_else(found):
    assert [line.split("|")[1].strip() for line in found.splitlines() if "| rules" in line] == [
        "rules store_over_context",
        "rules replicated",
    ]
    experiment = configs.load("mimo_vl/stage3", [])
    found = suggest.search(plan, experiment, plan(experiment, Topology.parse("v5p:4x4x4"), None), None, seconds=60)
    assert "| rules replicated" in found
    assert "store_over_context" not in found  # there is no `context` to store over


def test_no_compilation_begins_after_the_time_is_up():
    experiment = configs.load("mimo_vl/stage4", [])
    found = suggest.search(plan, experiment, plan(experiment, Topology.parse("v5p:4x4x4"), None), None, seconds=0)
    assert "out of time" in found
    assert found.count("GiB") == 1
    assert found.count("| remat") == 1


@pytest.mark.parametrize(
    ("config", "fields", "features"),
    [
        ("mimo_vl/stage4", [], 65536 // 4),  # four patches feed a token
        ("idefics2/pretrain", [], 31 * 64),  # whatever the size of a picture
        ("idefics2/pretrain_cross_attention", [], 31),  # a placeholder for each image
        ("mm1_5/pretrain", [], 16 * 144),
    ],
)
def test_full_rows_have_the_features_that_their_pictures_become(config, fields, features):
    experiment = configs.load(config, fields)
    data = experiment.data
    image = data.max_image_patches or 27 * 27 + 1
    lengths = SegmentLengths(data.seq_len, image)
    counts = lengths.counts(vlm.abstract(experiment.model), 3, data.seq_len, data.max_patches)
    assert (counts.vision_tokens, counts.targets) == (3 * features, 3 * (data.seq_len - features))
