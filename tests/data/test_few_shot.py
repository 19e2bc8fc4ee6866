"""Few-shot examples: who the demonstrations are, what has a loss, and that they follow from seed and index alone."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest

from jvlm.data import pipeline
from jvlm.data.check import check
from jvlm.data.config import DataConfig, FewShot
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.few_shot import FewShotSource
from jvlm.errors import UserError
from tests.support import picture


def chat(number, channel=None, **fields):
    messages = [{"role": "user", "content": f"<image>q{number}?"}, {"role": "assistant", "content": f"a{number}"}]
    channel = {} if channel is None else {"channel": channel}
    return {"messages": messages, "images": [picture(56, 56, number)], **channel, **fields}


class Records(list):
    """Records as a source."""

    def __getitem__(self, index):
        return Origin("memory.jsonl", index + 1), super().__getitem__(index)


def turns(conversation):
    return [(m.role, m.text, m.loss_weight) for m in conversation.messages]


CHANNELS = Records(chat(n, "ab"[n % 2]) for n in range(12))


def test_an_example_comes_last_after_others_of_its_channel_each_once():
    source = FewShotSource(CHANNELS, FewShot(shots=(1, 3)), seed=5)
    counts = collections.Counter()
    for index in range(12):
        origin, found = source[index]
        asked = [text for role, text, _ in turns(found) if role == "user"]
        numbers = [int(text[1:-1]) for text in asked]
        assert origin.number == index + 1 == found.origin.number
        assert numbers[-1] == index
        assert len(set(numbers)) == len(numbers)
        assert {n % 2 for n in numbers} == {index % 2}
        counts[len(numbers) - 1] += 1
        # demonstrations have no loss, and every image is that of its question
        assert [w for role, _, w in turns(found) if role == "assistant"] == [0.0] * (len(numbers) - 1) + [1.0]
        assert [np.asarray(i.source).tobytes() for i in found.images] == [
            np.asarray(picture(56, 56, n)).tobytes() for n in numbers
        ]
        assert [i.index for i in found.images] == list(range(len(numbers)))
    assert set(counts) == {1, 2, 3}


def test_they_follow_from_the_seed_and_the_index_alone():
    config = FewShot(shots=(2, 4), same="source")
    one, other = (FewShotSource(CHANNELS, config, seed=1) for _ in range(2))
    forward = [turns(one[index][1]) for index in range(12)]
    backward = [turns(other[index][1]) for index in reversed(range(12))]
    assert forward == backward[::-1]
    assert forward != [turns(FewShotSource(CHANNELS, config, seed=2)[index][1]) for index in range(12)]


def test_all_answers_may_have_a_loss_and_boxes_stay_on_their_image():
    def boxed(n):
        record = chat(n, objects={"ref": [], "bbox": [[n, n, n + 20, n + 30]]})
        record["messages"][1]["content"] = "<bbox>"
        return record

    source = FewShotSource(Records(map(boxed, range(4))), FewShot((3, 3), "source", "all"), seed=0)
    _, found = source[2]
    assert [w for role, _, w in turns(found) if role == "assistant"] == [1.0] * 4
    for message, answer in zip(found.messages[::2], found.messages[1::2], strict=True):
        (image,), (box,) = message.media, answer.boxes
        assert box.image == image.index
        assert message.text == f"q{int(box.region.values[0])}?"


def test_the_system_turn_is_that_of_the_example_asked():
    def briefed(n):
        record = chat(n)
        return {**record, "messages": [{"role": "system", "content": f"s{n}"}, *record["messages"]]}

    _, found = FewShotSource(Records(map(briefed, range(3))), FewShot((2, 2), "source"), seed=0)[1]
    assert [m.text for m in found.messages if m.role == "system"] == ["s1"]
    assert found.messages[0].role == "system"


def test_a_small_source_gives_what_it_has_and_a_lonely_channel_is_named():
    _, found = FewShotSource(Records([chat(0), chat(1)]), FewShot((4, 8)), seed=0)[0]
    assert len(found.messages) == 4
    _, error = FewShotSource(Records([*CHANNELS, chat(99, "c")]), FewShot((1, 2)), seed=0)[12]
    assert isinstance(error, ExampleError)
    assert "0 other examples of channel 'c'" in error.problem
    assert error.origin.number == 13


BAD = {
    "a document": ({"text": "a"}, "a document, which has no turns"),
    "other image settings": (chat(1, chat_template_kwargs={"max_pixels": 4000}), "differs from that of memory.jsonl"),
    "a line that is no JSON": (ExampleError(Origin("memory.jsonl", 2), "example", "not JSON", "x"), "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_demonstration_is_an_error_of_the_example(name):
    record, said = BAD[name]
    _, error = FewShotSource(Records([chat(0), record]), FewShot((1, 1), "source"), seed=0)[0]
    assert isinstance(error, ExampleError)
    assert said in error.problem


@pytest.mark.parametrize("shots", [(0, 2), (3, 2)])
def test_numbers_that_make_no_sense_are_refused(shots):
    with pytest.raises(UserError, match=r"few_shot.shots is a smaller and a larger number"):
        FewShot(shots=shots)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two files in folders of their own, each with its images."""
    paths = []
    for name in "ab":
        folder = tmp_path_factory.mktemp(name)
        records = []
        for n in range(5):
            picture(56, 56, n).save(folder / f"{name}{n}.png")
            records.append({**chat(n), "images": [f"{name}{n}.png"]})
        path = folder / "chats.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        paths.append(str(path))
    return paths


def test_a_run_with_demonstrations_goes_on_as_if_unbroken_with_any_threads(tiny, folders):
    config = DataConfig(
        train=tuple(folders),
        few_shot=FewShot((1, 3), "source"),
        batch_size=1,
        seq_len=256,
        max_patches=256,
        pack_window=3,
    )

    def stream(threads=4):
        changed = dataclasses.replace(config, read_threads=threads)
        return iter(pipeline.training_data(tiny.processor, changed, seed=0, epochs=1)[0])

    whole = list(stream())
    assert sum(one.conversations for one in whole) == 10
    first = stream(threads=1)
    begin = [next(first), next(first)]
    rest = stream()
    rest.set_state(first.get_state())
    for one, other in zip(whole, begin + list(rest), strict=True):
        np.testing.assert_array_equal(one.batch.tokens, other.batch.tokens)
        np.testing.assert_array_equal(one.batch.patches, other.batch.patches)
    report = check(folders, tiny.processor, config)
    assert report.usable == 10
    # two to four images an example, of 16 patches each
    assert {patches // 16 for patches in report.patches} <= {2, 3, 4}
    assert len(ExampleSource(folders)) == 10
