"""Examples of preferences: what is read of each format, and how two answers share a sequence."""

import json

import numpy as np
import pytest
from PIL import Image

from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.pipeline import complete_window
from jvlm.data.preferences import labelled, pair
from jvlm.errors import UserError

QUESTION, GOOD, BAD = "<image>what is it?", "a red circle", "a blue triangle"
ASKED = [{"role": "user", "content": QUESTION}]
IMAGES = {"images": ["a.png"]}


def answer(text):
    return [{"role": "assistant", "content": text}]


BLOCKS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
FORMATS = {
    "ms-swift": {"messages": ASKED + answer(GOOD), "rejected_response": BAD, **IMAGES},
    "ms-swift, messages": {"messages": ASKED + answer(GOOD), "rejected_messages": ASKED + answer(BAD), **IMAGES},
    "ms-swift, answer as messages": {"messages": ASKED + answer(GOOD), "rejected_response": answer(BAD), **IMAGES},
    "ms-swift, query": {"query": QUESTION, "response": GOOD, "rejected_response": BAD, **IMAGES},
    "trl": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, **IMAGES},
    "trl, untagged": {"prompt": "what is it?", "chosen": GOOD, "rejected": BAD, **IMAGES},
    "trl, conversational": {"prompt": BLOCKS, "chosen": answer(GOOD), "rejected": answer(BAD), **IMAGES},
    "trl, implicit prompt": {"chosen": BLOCKS + answer(GOOD), "rejected": BLOCKS + answer(BAD), **IMAGES},
    "llama-factory": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
        **IMAGES,
    },
    "llama-factory, messages": {
        "messages": ASKED,
        "chosen": {"role": "assistant", "content": GOOD},
        "rejected": {"role": "assistant", "content": BAD},
        **IMAGES,
    },
    "llama-factory, alpaca": {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD, **IMAGES},
}


def read(folder, *records):
    """The records of a file as training reads them."""
    Image.new("RGB", (40, 32), (255, 0, 0)).save(folder / "a.png")
    Image.new("RGB", (32, 32), (0, 0, 255)).save(folder / "b.png")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = ExampleSource.of(DataConfig(train=(str(folder / "pairs.jsonl"),)))
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_is_the_same_whatever_format_it_comes_in(name, tmp_path):
    ((origin, record),) = read(tmp_path, FORMATS[name])
    chosen, rejected = pair(parse_example(record, origin)).conversations
    assert [m.role for m in chosen.messages] == [m.role for m in rejected.messages] == ["user", "assistant"]
    assert (chosen.messages[0].text, chosen.messages[1].text, rejected.messages[1].text) == ("what is it?", GOOD, BAD)
    assert [part.source for part in chosen.images] == [part.source for part in rejected.images] == ["a.png"]
    assert [m.loss_weight for m in chosen.messages] == [m.loss_weight for m in rejected.messages] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected_response": GOOD}, "field 'rejected_messages': the rejected answer is the chosen one"),
        ({"rejected_response": None}, "field 'rejected_response': missing"),
        ({"rejected_messages": ASKED + answer(BAD)}, "given together with 'rejected_messages'"),
        ({"messages": ASKED}, "field 'messages': no answer at its end"),
        ({"messages": answer(GOOD), "images": []}, "field 'messages': an answer to nothing"),
        ({"margin": "big"}, "field 'margin': 'big' is not a number"),
        ({"messages": [*ASKED, {**answer(GOOD)[0], "loss_scale": 0.5}]}, "0.5: log-probabilities of answers"),
    ],
)
def test_a_pair_that_says_nothing_names_its_field(changes, message):
    record = {**FORMATS["ms-swift"], **changes}
    with pytest.raises(ExampleError) as error:
        pair(parse_example(record, Origin("pairs.jsonl", 3)))
    assert "pairs.jsonl, line 3" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("label", [None, "good", 2])
def test_a_label_is_true_or_false(label):
    record = {"messages": ASKED + answer(GOOD), "label": label, **IMAGES}
    with pytest.raises(ExampleError, match=r"field 'label'.* is not true or false"):
        labelled(parse_example(record))


def test_settings_that_would_change_one_answer_of_a_pair_are_refused():
    for changes in (
        {"shuffle_turns": True},
        {"upscale_probability": 0.5},
        {"on_too_long": "truncate"},
        {"loss": "all"},
    ):
        with pytest.raises(UserError, match=f"data.{next(iter(changes))}.* does not go with data.preference 'pairs'"):
            DataConfig(preference="pairs", **changes)


def encode(tiny, records, folder, kind="pairs", **changes):
    config = DataConfig(preference=kind, seq_len=256, max_patches=256, **changes)
    encoder = Encode(tiny.processor, config)
    places = [encoder.random_map(one, np.random.default_rng(0)) for one in read(folder, *records)]
    return [one for place in complete_window(places, config) for one in place]


def test_two_answers_are_two_segments_whose_picture_is_laid_out_once(tiny, tmp_path):
    shared, own = encode(
        tiny,
        [
            FORMATS["ms-swift"],
            {**FORMATS["ms-swift"], "rejected_response": None, "rejected_messages": ASKED + answer(BAD)}
            | {"rejected_images": ["b.png"]},
        ],
        tmp_path,
    )
    alone = tiny.processor.encode({"messages": ASKED + answer(GOOD), "images": [str(tmp_path / "a.png")]})
    other = tiny.processor.encode({"messages": ASKED + answer(BAD), "images": [str(tmp_path / "b.png")]})
    assert (shared.num_segments, shared.num_patches) == (2, alone.num_patches)
    assert (own.num_segments, own.num_patches) == (2, alone.num_patches + other.num_patches)
    first, second = (shared.segments == n for n in (1, 2))
    np.testing.assert_array_equal(shared.tokens[first], alone.tokens)
    np.testing.assert_array_equal(shared.positions[first], alone.positions)
    for inside in (first, second):
        assert (
            np.unique(shared.vision_index[inside][shared.vision_index[inside] >= 0]).size
            == alone.vision_index.max() + 1
        )
    # beside another example, what feeds it moves with it
    batch = packing.assemble([[own, shared]], 512, 512)
    assert set(np.unique(batch.segment_ids)) == {0, 1, 2, 3, 4}
    vision = [batch.vision_index[0][batch.segment_ids[0] == n] for n in (1, 2, 3, 4)]
    images = [tuple(sorted(set(v[v >= 0].tolist()))) for v in vision]
    assert images[2] == images[3]
    assert len({images[0], images[1], images[2]}) == 3
    np.testing.assert_array_equal(batch.patches[0, : own.num_patches], own.patches)


def test_a_pair_that_does_not_fit_goes_as_a_whole(tiny, tmp_path):
    (left,) = encode(tiny, [FORMATS["ms-swift"]], tmp_path, max_length=4)
    assert left.kind == "too_long"
    (left,) = encode(tiny, [FORMATS["ms-swift"] | {"messages": ASKED + answer("word " * 33)}], tmp_path)
    assert "of 2 answers with their prompts do not fit 256 together" in left.reason


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_pictures_of_a_pair_that_does_not_fit_are_made_smaller_for_both_answers_alike(tiny, tmp_path, kind):
    def large(folder):
        Image.effect_noise((224, 160), 60).convert("RGB").save(folder / "large.png")
        return {**FORMATS["ms-swift"], "images": ["large.png"], "label": True}

    record = large(tmp_path)
    (whole,) = encode(tiny, [record], tmp_path, kind)
    assert whole.num_patches > 64
    config = {"max_image_patches": 64}
    (left,) = encode(tiny, [record], tmp_path, kind, **config)
    assert left.kind == "too_long"
    (shrunk,) = encode(tiny, [record], tmp_path, kind, on_too_long="shrink", **config)
    assert (shrunk.made_to_fit, shrunk.num_segments) == ("shrunk", 2)
    assert 32 <= shrunk.num_patches <= 64
    shares = [shrunk.vision_index[shrunk.segments == number] for number in (1, 2)]
    assert shares[0].max() >= 0
    assert set(shares[0]) == set(shares[1])  # one copy of the picture, which both answers see
    if kind == "pairs":
        numbers = [[values["answer"] for values in example.values] for example in (whole, shrunk)]
        assert len({*numbers[0], *numbers[1]}) == 4  # other pixels are other answers to a reference that is stored
    for number, text in ((1, GOOD), (2, BAD)):
        if kind == "pairs":
            inside = (shrunk.segments == number) & (shrunk.loss_weights > 0)
            assert text in tiny.processor.decode(shrunk.tokens[inside])


def test_an_answer_with_a_label_comes_with_its_neighbours_answer_to_its_own_prompt(tiny, tmp_path):
    records = [
        {"messages": ASKED + answer(text), "label": good, **IMAGES}
        for text, good in ((GOOD, True), (BAD, False), ("nothing", True))
    ]
    examples = encode(tiny, records, tmp_path, "labels")
    assert [example.values for example in examples] == [({"desirable": n}, {}) for n in (1.0, 0.0, 1.0)]
    for example, before in zip(examples, [examples[-1], *examples[:-1]], strict=True):
        text = before.tokens[before.segments == 1][before.loss_weights[before.segments == 1] > 0]
        prompt = {"messages": ASKED + answer(tiny.processor.decode(text)), "images": [str(tmp_path / "a.png")]}
        expected = tiny.processor.encode(prompt)
        other = example.segments == 2
        for name in ("tokens", "positions", "loss_weights", "vision_index"):
            np.testing.assert_array_equal(getattr(example, name)[other], getattr(expected, name), err_msg=name)
        assert example.num_patches == expected.num_patches
