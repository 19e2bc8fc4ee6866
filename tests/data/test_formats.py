"""Every format's record gives the tokens, weights and patches of the record that is written by hand."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jvlm import cli
from jvlm.data import pipeline
from jvlm.data.config import DataConfig
from jvlm.data.conversion import convert
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.formats.detection import FORMATS, Detected, detect, format_of
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from tests.training import support

PROMPT = "What is the total?"
ANSWER = "$41.20"


def _swift(user="<image>" + PROMPT, answer=ANSWER, **fields):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["r.png"], **fields}


def _document(*blocks):
    return {"document": [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks]}


IMAGE = {"type": "image", "image": "r.png"}
_TEXT = {"type": "text", "text": PROMPT}
_SAID = [{"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
_ASKED = [{"role": "user", "content": [{"type": "image"}, _TEXT]}]

# (format, options, record, the same by hand)
CASES = {
    "ms-swift": ("messages", {}, _swift(), _swift()),
    "OpenAI": (
        "messages",
        {},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "r.png"}}, _TEXT]},
                {"role": "assistant", "content": ANSWER},
            ]
        },
        _swift(),
    ),
    "Anthropic": (
        "messages",
        {},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "r.png"}}, _TEXT]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            ]
        },
        _swift(),
    ),
    "messages without a tag": ("messages", {}, _swift(PROMPT), _swift()),
    "messages as Arrow's struct of lists": (
        "messages",
        {},
        {"messages": {"role": ["user", "assistant"], "content": ["<image>" + PROMPT, ANSWER]}, "images": ["r.png"]},
        _swift(),
    ),
    "LLaVA": (
        "llava",
        {},
        {
            "id": "17",
            "image": "r.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + PROMPT},
                {"from": "gpt", "value": ANSWER},
            ],
        },
        _swift("<image>\n" + PROMPT),
    ),
    "ShareGPT's pairs, an image without a tag": (
        "llava",
        {},
        {"image": "r.png", "conversation": [{"human": PROMPT, "assistant": ANSWER}]},
        _swift(),
    ),
    "TRL": ("trl", {}, {"images": ["r.png"], "prompt": _ASKED, "completion": _SAID}, _swift()),
    "TRL with texts": ("trl", {}, {"images": ["r.png"], "prompt": PROMPT, "completion": ANSWER}, _swift()),
    "TRL's preferences": (
        "trl",
        {},
        {"images": ["r.png"], "prompt": _ASKED, "chosen": _SAID, "rejected": [{"role": "assistant", "content": "no"}]},
        _swift(),
    ),
    "verl": (
        "verl",
        {},
        {
            "data_source": "geo3k",
            "prompt": [{"role": "user", "content": "<image>" + PROMPT}, {"role": "assistant", "content": ANSWER}],
            "images": [{"bytes": None, "path": "r.png"}],
            "reward_model": {"style": "rule", "ground_truth": "12"},
        },
        _swift(),
    ),
    "EasyR1": (
        "easyr1",
        {"answer_as_turn": True},
        {"images": ["r.png"], "problem": "<image>" + PROMPT, "answer": ANSWER},
        _swift(),
    ),
    "the Cauldron": (
        "cauldron",
        {},
        {"images": ["r.png"], "texts": [{"user": PROMPT, "assistant": ANSWER, "source": "docvqa"}]},
        _swift(),
    ),
    "the Cauldron as Arrow's struct of lists": (
        "cauldron",
        {},
        {"images": ["r.png"], "texts": {"user": [PROMPT], "assistant": [ANSWER], "source": ["docvqa"]}},
        _swift(),
    ),
    "query and response": (
        "query_response",
        {},
        {"image": "r.png", "question": PROMPT, "answers": [ANSWER]},
        _swift(),
    ),
    "a history": (
        "query_response",
        {},
        {"query": PROMPT, "response": ANSWER, "history": [["hi", "hello"]]},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"},
                *_swift(PROMPT)["messages"],
            ]
        },
    ),
    "Alpaca": (
        "alpaca",
        {},
        {"instruction": PROMPT, "input": "Look.", "output": ANSWER, "image": "r.png"},
        _swift("<image>" + PROMPT + "\nLook."),
    ),
    "a caption as a question": (
        "caption",
        {"caption_prompt": PROMPT},
        {"image": "r.png", "caption": ANSWER},
        _swift(),
    ),
    "a caption": ("caption", {}, {"image": "r.png", "caption": "A receipt."}, _document(IMAGE, "A receipt.")),
    "WebDataset's caption": ("caption", {}, {"image": "r.png", "txt": "A receipt."}, _document(IMAGE, "A receipt.")),
    "text alone": ("document", {}, {"text": "Once upon a time.", "url": "a"}, _document("Once upon a time.")),
    "a page with tags": (
        "document",
        {},
        {"text": "A <image> and more.", "images": ["r.png"]},
        _document("A ", IMAGE, " and more."),
    ),
    "OBELICS": (
        "document",
        {},
        {"texts": ["A", None, "B"], "images": [None, "r.png", None]},
        _document("A", IMAGE, "B"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "r.png")
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("processor")
    experiment = support.experiment(folder, support.write_examples(folder, 1))
    tokenizer = AutoTokenizer.from_pretrained(str(experiment.tokenizer), local_files_only=True)
    config = dataclasses.replace(experiment.processor, document_end=tokenizer.eos_token)
    return Processor(tokenizer, experiment.model, config)


def _source(folder, *records, **options):
    path = folder / f"{abs(hash(json.dumps(records)))}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ExampleSource([str(path)], FormatOptions(**options))


@pytest.mark.parametrize("case", CASES)
def test_tokens_weights_and_patches_are_those_of_the_record_written_by_hand(folder, processor, case):
    name, options, record, by_hand = CASES[case]
    assert format_of({key: value for key, value in record.items() if value is not None}).name == name
    source = _source(folder, record, **options)
    assert f"format {name}," in source.formats()[0]
    origin, converted = source[0]
    found = processor.encode(parse_example(converted, origin))
    expected = processor.encode(parse_example(by_hand, origin))
    for field in ("tokens", "loss_weights", "vision_index", "patches", "positions"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    assert len(found.patches) or "image" not in json.dumps(by_hand)


def test_what_a_format_does_not_use_is_carried_along(folder):
    record = dict(CASES["verl"][2], ability="math", extra_info={"index": 3})
    (_, found) = _source(folder, record)[0]
    assert found["solution"] == "12"
    assert (found["data_source"], found["ability"], found["extra_info"]) == ("geo3k", "math", {"index": 3})
    (_, found) = _source(folder, CASES["the Cauldron"][2])[0]
    assert found["channel"] == "docvqa"
    (_, found) = _source(folder, CASES["TRL's preferences"][2])[0]
    assert found["rejected_messages"][-1]["content"] == "no"
    assert found["rejected_messages"][:-1] == _ASKED


def test_keys_of_turns_that_a_format_does_not_use_are_carried_along_and_listed(folder, capsys):
    turns = [{"from": "human", "value": PROMPT, "id": 1}, {"from": "gpt", "value": ANSWER, "model": "x", "id": 2}]
    (_, found) = _source(folder, {"conversations": turns})[0]
    assert (found["conversations[].id"], found["conversations[].model"]) == ([1, 2], ["x"])
    texts = [{"user": PROMPT, "assistant": ANSWER, "rating": 3}]
    path = folder / "rated.jsonl"
    path.write_text(json.dumps({"images": ["r.png"], "texts": texts}) + "\n")
    assert cli.main(["data", "check", str(path)]) == 0
    assert "column 'texts[].rating' is not used, in 1 example" in capsys.readouterr().out


def test_the_weight_of_a_turn_is_that_of_the_loss_of_an_answer(folder):
    def loss_weights(record):
        (origin, found) = _source(folder, record)[0]
        return [message.loss_weight for message in parse_example(found, origin).messages]

    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": "x", "weight": n % 2 and n // 2} for n, role in enumerate(roles)]
    assert loss_weights({"messages": turns}) == [0, 0, 0, 1]
    names, weights = ("human", "gpt", "human", "gpt"), (1.0, None, 0.0, 0.5)
    turns = [{"from": name, "value": "x", "weight": weight} for name, weight in zip(names, weights, strict=True)]
    assert loss_weights({"conversations": turns}) == [0, 1, 0, 0.5]


def test_image_tags_of_llava_video_stand_for_its_videos(folder):
    def asked(**media):
        turns = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "A car."}]
        return _source(folder, {"conversations": turns, **media})[0][1]["messages"][0]["content"]

    assert asked(video="a.mp4") == "<video>\nWhat moves?"
    assert asked(image="r.png") == "<image>\nWhat moves?"
    assert asked(videos=["a.mp4", "b.mp4"]).count("<video>") == 2  # not for each a tag: before the first user text


def test_a_prompt_for_reinforcement_learning_has_no_answer_to_train_on(folder):
    record = {"images": ["r.png"], "problem": "<image>" + PROMPT, "answer": 12}
    source = _source(folder, record)
    assert source[0][1]["solution"] == "12"
    assert [message["role"] for message in source[0][1]["messages"]] == ["user"]
    assert "data.answer_as_turn true" in source.formats()[0]


def test_calls_of_tools_are_those_of_the_assistants_turn(folder):
    call = {"name": "add", "arguments": {"a": 1}}
    expected = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}] * 2},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    llava = [("human", "1?"), *[("function_call", json.dumps(call))] * 2, ("observation", "2"), ("gpt", "two")]
    swift = [("user", "1?"), *[("tool_call", json.dumps(call))] * 2, ("tool_response", "2"), ("assistant", "two")]
    use = {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}
    anthropic = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": [use, use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}]},
        {"role": "assistant", "content": "two"},
    ]
    for record in (
        {"conversations": [{"from": name, "value": value} for name, value in llava]},
        {"messages": [{"role": name, "content": value} for name, value in swift]},
        {"messages": anthropic},
    ):
        assert _source(folder, record)[0][1]["messages"] == expected
        assert parse_example(_source(folder, record)[0][1])


def test_text_of_a_format_without_tags_is_never_a_tag(folder, processor):
    record = {"images": ["r.png"], "texts": [{"user": "What does <image> mean?", "assistant": "<image> is a word"}]}
    origin, converted = _source(folder, record)[0]
    conversation = parse_example(converted, origin)
    assert len(list(conversation.images)) == 1
    encoded = processor.encode(conversation)
    assert "<image> is a word" in processor.tokenizer.decode(encoded.tokens)


def test_a_later_example_of_another_format_names_both(folder):
    llava = CASES["LLaVA"][2]
    source = _source(folder, *[llava] * 3, CASES["the Cauldron"][2])
    error = source[3][1]
    assert isinstance(error, ExampleError)
    assert "line 4" in str(error)
    assert "'cauldron'" in str(error)
    assert "'llava'" in str(error)
    assert not isinstance(source[2][1], ExampleError)


def test_the_format_is_decided_on_the_first_hundred_and_each_pattern_has_its_own(folder):
    llava, cauldron = CASES["LLaVA"][2], CASES["the Cauldron"][2]
    (folder / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [llava] * 100 + [cauldron] * 300))
    (folder / "other.jsonl").write_text(json.dumps(cauldron) + "\n")
    source = ExampleSource([str(folder / "many.jsonl"), str(folder / "other.jsonl")])
    assert ["format llava" in source.formats()[0], "format cauldron" in source.formats()[1]] == [True, True]
    assert "by 100 of the first 100" in source.formats()[0]
    assert isinstance(source[100][1], ExampleError)
    assert not isinstance(source[400][1], ExampleError)
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == source[0]
    assert again.formats() == source.formats()


def test_columns_are_renamed_hidden_and_checked(folder):
    record = {"my_q": PROMPT, "my_a": ANSWER, "text": "noise", "image": "r.png"}
    columns = ("my_q=query", "my_a=response", "text=_")
    _, found = _source(folder, record, columns=columns)[0]
    assert [message["content"] for message in found["messages"]] == ["<image>" + PROMPT, ANSWER]
    assert found.keys() == {"messages", "image"}
    with pytest.raises(UserError, match=r"renames 'my_w'.*they have image, my_a, my_q, text"):
        _source(folder, record, columns=("my_w=query",))[0]
    with pytest.raises(UserError, match="'my_q' is not FROM=TO"):
        _source(folder, record, columns=("my_q",))[0]
    error = _source(folder, record, columns=("my_q=text",))[0][1]
    assert "the name of two columns" in str(error)


def test_a_format_that_is_given_is_taken_and_an_unknown_one_refused(folder):
    record = {"problem": PROMPT, "answer": ANSWER}
    _, found = _source(folder, record, format="query_response")[0]
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    with pytest.raises(UserError, match=r"data\.format is 'llawa'; there are auto, messages, document"):
        _source(folder, record, format="llawa")[0]


def test_images_without_a_tag_are_counted_and_reported(folder, capsys):
    tagged, untagged = _swift(), _swift(PROMPT)
    (folder / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [tagged, untagged, untagged]))
    assert cli.main(["data", "check", str(folder / "mixed.jsonl")]) == 0
    assert "2 examples have images without a tag" in capsys.readouterr().out
    assert cli.main(["data", "convert", str(folder / "mixed.jsonl"), "--output", str(folder / "shards")]) == 0
    out = capsys.readouterr().out
    assert "3 examples read, 3 written, 0 left out" in out
    assert "2 examples had images without a tag" in out
    source = ExampleSource([str(folder / "shards")])
    assert {source[i][1]["messages"][0]["content"] for i in range(3)} == {"<image>" + PROMPT}


def test_some_tags_for_more_images_are_an_error(folder):
    origin, record = _source(folder, _swift(images=["r.png", "r.png"]))[0]
    with pytest.raises(ExampleError, match="1 <image> tags but 2 entries"):
        parse_example(record, origin)


def test_the_options_of_conversions_are_fields_of_the_data():
    names = {field.name for field in dataclasses.fields(FormatOptions)}
    assert names <= {field.name for field in dataclasses.fields(DataConfig)}


@pytest.mark.parametrize("case", ["LLaVA", "the Cauldron", "OBELICS"])
def test_batches_of_shards_are_those_of_what_was_converted(folder, tmp_path, processor, case):
    _, _, record, _ = CASES[case]
    words = json.dumps(record)
    (tmp_path / "r.png").write_bytes((folder / "r.png").read_bytes())
    lines = [words.replace("total", f"total {n}").replace('"A"', f'"A {n}"') for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    convert([str(tmp_path / "a.jsonl")], tmp_path / "s", 7)
    (tmp_path / "r.png").unlink()
    config = DataConfig(batch_size=2, seq_len=128, max_patches=256, pack_window=6, read_threads=2)
    found = {}
    for pattern in (str(tmp_path / "s"), str(tmp_path / "a.jsonl")):
        if pattern.endswith("jsonl"):  # shards have their images in them
            (tmp_path / "r.png").write_bytes((folder / "r.png").read_bytes())
        data = dataclasses.replace(config, train=(pattern,))
        batches, _ = pipeline.training_data(processor, data, seed=3, epochs=2)
        found[pattern] = [packed.batch for packed in batches]
    of_shards, of_lines = found.values()
    assert len(of_shards) == len(of_lines) > 2
    for a, b in zip(of_shards, of_lines, strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


_RECORDS = [case[2] for case in CASES.values()]
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3), st.just("<image>")
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("from value role content type user assistant human text url".split()), inner),
    ),
    max_leaves=6,
)


@st.composite
def _damaged(draw):
    """A record of some format with fields of others, missing and mistyped ones, in another order."""
    record = dict(draw(st.sampled_from(_RECORDS)))
    record |= draw(st.dictionaries(st.sampled_from(sorted({k for r in _RECORDS for k in r})), _VALUES, max_size=3))
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=2)):
        record.pop(name, None)
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=2)) if record else ():
        if isinstance(record[name], list) and record[name]:
            record[name] = [*record[name], draw(_VALUES)]
            record[name] = draw(st.permutations(record[name]))
    return dict(draw(st.permutations(list(record.items()))))


def _error_of(work) -> ExampleError | None:
    try:
        work()
    except ExampleError as error:
        return error
    return None


@given(record=_damaged(), number=st.integers(0, len(FORMATS)), as_turn=st.booleans(), prompt=st.none() | st.just("p"))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_conversion_is_total(record, number, as_turn, prompt):
    options = FormatOptions(answer_as_turn=as_turn, caption_prompt=prompt)
    origin = Origin("a.jsonl", 1)
    detected = detect([(origin, record)], options)
    if number < len(FORMATS):
        detected = Detected(FORMATS[number], options, "given")
    error = _error_of(lambda: parse_example(detected.convert(record, origin)[0], origin))
    assert error is None or (error.origin == origin and error.fix)
