"""The parts of the data of `make demo-rl`: no image that settings are chosen by, or that is scored, is trained on."""

from pathlib import Path

from jvlm import configs
from jvlm.data.config import DataConfig
from jvlm.data.mixture.examples import Examples
from tools.make_easy_vqa import held_out_parts


def records(files: tuple[str, ...]) -> list[dict]:
    examples = Examples.open(DataConfig(train=files))
    return [examples[number][1] for number in range(len(examples))]


def images(found: list[dict]) -> set[bytes]:
    return {image["bytes"] for example in found for image in example["images"]}


def test_images_of_training_validation_and_test_are_different_ones():
    start, policy = configs.load("align/easy_vqa_start"), configs.load("align/easy_vqa_rl")
    trained = [*(stage.data.train for stage in start.stages), start.data.train, policy.data.train]
    parts = [tuple(dict.fromkeys(sum(trained, ()))), policy.validation.data, policy.evaluation.data]
    assert start.evaluation.data == policy.validation.data
    found = [images(records(files)) for files in parts]
    assert [len(part) for part in found] == [4000, 334, 666]
    assert sum(map(len, found)) == len(set().union(*found))


def test_held_out_parts_are_those_of_the_official_test_images():
    folder = Path(configs.load("align/easy_vqa_rl").evaluation.data[0]).parent
    for name, conversations in held_out_parts(records((str(folder / "test.arrayrecord"),))).items():
        assert records((str(folder / f"{name}.arrayrecord"),)) == conversations
        turns = [len(conversation["messages"]) for conversation in conversations]
        assert set(turns) == {2}
        assert len({c["id"] for c in conversations}) == len(conversations)
