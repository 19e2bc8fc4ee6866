"""What an example and the command line may change about the image processor, for every family."""

import dataclasses
import json

import pytest

from jvlm import families
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.image_processor import ImageProcessorConfig

QWEN, TILES, EDGES = (families.get(name).image_config for name in ("qwen2_5_vl", "mm1_5", "idefics2"))
BAD = {
    "limits that contradict": (
        QWEN,
        {"min_pixels": 200704, "max_pixels": 50176},
        "min_pixels",
        "min_pixels 200704 exceeds max_pixels 50176",
    ),
    "limits of videos that contradict": (
        QWEN,
        {"video_min_pixels": 9, "video_max_pixels": 8},
        "video_min_pixels",
        "9 exceeds video_max_pixels 8",
    ),
    "tiles that contradict": (TILES, {"max_tiles": 2, "min_tiles": 3}, "min_tiles", "3 exceeds max_tiles 2"),
    "tiles that contradict the model's": (TILES, {"max_tiles": 2}, "max_tiles", "min_tiles 4 and max_tiles 2"),
    "edges that contradict": (
        EDGES,
        {"shortest_edge": 980, "longest_edge": 378},
        "shortest_edge",
        "980 exceeds longest_edge 378",
    ),
    "edges that contradict the model's": (EDGES, {"longest_edge": 300}, "longest_edge", "shortest_edge 378 must be"),
    "a limit that is NaN": (QWEN, {"fps": float("nan")}, "fps", "not a positive"),
    "a limit that is infinite": (QWEN, {"max_pixels": float("inf")}, "max_pixels", "not a positive"),
    "a limit of 400 digits": (QWEN, {"max_pixels": 10**400}, "max_pixels", "not a positive"),
    "a limit that is true": (QWEN, {"fps": True}, "fps", "not a positive"),
    "a limit with a fraction": (TILES, {"num_frames": 2.5}, "num_frames", "2.5 is not a positive whole number"),
    "a limit of zero": (QWEN, {"fps": 0}, "fps", "not a positive"),
    "a limit that would fill the memory": (QWEN, {"min_pixels": 10**12}, "min_pixels", "not within 1 to"),
    "tiles without end": (TILES, {"max_tiles": 10**9}, "max_tiles", "not within"),
    "an unknown limit": (QWEN, {"maxpixels": 3}, "maxpixels", "not a setting of this model's.*Use fps, max_pixels"),
    "a limit of another family": (EDGES, {"max_pixels": 3}, "max_pixels", "Use longest_edge, shortest_edge"),
    "a field that is no limit": (QWEN, {"resample": 2}, "resample", "not a setting"),
    "a limit that is no number": (QWEN, {"fps": "2"}, "fps", "not a positive"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_setting_of_an_example_is_refused_with_its_field_and_a_fix(kind):
    config, fields, field, problem = BAD[kind]
    example = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": fields}
    conversation = parse_example(example, Origin("examples.jsonl", 12))
    with pytest.raises(ExampleError, match=f"line 12, field 'chat_template_kwargs.{field}': .*{problem}"):
        config.for_example(dict(conversation.image_settings), conversation.origin)


@pytest.mark.parametrize("name", families.names())
def test_every_limit_is_a_field_that_can_be_set_to_its_default(name):
    config = families.get(name).image_config
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert config.limits
    for field, limit in config.limits.items():
        assert limit.help
        assert limit.at_most is None or limit.at_most in fields
        assert config.changed({field: fields[field]}) == config


def test_whole_numbers_that_pandas_made_floats_are_whole_again():
    assert QWEN.changed({"max_pixels": 50176.0}) == dataclasses.replace(QWEN, max_pixels=50176)
    assert json.dumps(QWEN.changed({"max_pixels": 50176.0}).max_pixels) == "50176"


def test_settings_without_an_image_processor_say_so():
    with pytest.raises(NotImplementedError, match="ImageProcessorConfig defines no build"):
        ImageProcessorConfig().build(None)
