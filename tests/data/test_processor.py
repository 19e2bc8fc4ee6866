"""From an example to token ids, loss weights and media: as transformers' processor does it, and what only jvlm does."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2_5_VLProcessor

from jvlm import config as config_tree
from jvlm.data.boxes import Box
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from tests.support import chat_messages, image_processor, picture

SPAN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


class WithoutVideo(Qwen2_5_VLProcessor):
    """transformers' processor; its check wants the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def theirs(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    return WithoutVideo(image_processor(tiny.folder), tokenizer, None, chat_template=tokenizer.chat_template)


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


CHATS = {
    "one picture": {"messages": [user("<image>what is it?"), assistant("a cat")], "images": [picture(140, 84)]},
    "text": {"messages": [user("is there a dog?"), assistant("no, none.")]},
    "a system prompt": {
        "messages": [{"role": "system", "content": "be brief"}, user("<image>?"), assistant("a cat")],
        "images": [picture(84, 140)],
    },
    "pictures between words, several turns": {
        "messages": [
            user("first <image> then<image>"),
            assistant("both"),
            user("and<image> this?\n"),
            assistant("the  dog\nruns "),
        ],
        "images": [picture(56, 56), picture(200, 90, 1), picture(112, 112, 2)],
    },
    "accents, in both normal forms, emoji and Chinese": {
        "messages": [user("caf\u00e9 cafe\u0301 \U0001f600"), assistant("\u56fe\u7247 e\u0301\u00e9 \U0001f600")]
    },
    "literal tags and markers in words": {"messages": [user("what is <bbox>?"), assistant("<ref-object> {{ x }}")]},
    "an empty answer": {"messages": [user("is there a dog?"), assistant("")]},
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_token_ids_equal_those_of_transformers(tiny, theirs, name, generation_prompt):
    record = CHATS[name]
    if generation_prompt:
        record = {**record, "messages": record["messages"][:-1]}
        if len(record["messages"]) > 1 and record.get("images"):
            record["images"] = record["images"][: sum(m["content"].count("<image>") for m in record["messages"])]
    messages = chat_messages(record)
    text = theirs.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    expected = theirs(text=[text], images=record.get("images"), return_tensors="np")
    example = tiny.processor.encode(record, generation_prompt=generation_prompt)
    np.testing.assert_array_equal(example.tokens, expected["input_ids"][0])
    np.testing.assert_array_equal(example.vision_index >= 0, expected["mm_token_type_ids"][0] > 0)
    rendered = tiny.processor.template.render(parse_example(record).messages, generation_prompt=generation_prompt)
    assert rendered == text


def test_a_final_answer_is_dropped_when_the_model_shall_give_one(tiny):
    example = CHATS["one picture"]
    without = {**example, "messages": example["messages"][:-1]}
    left, right = (tiny.processor.encode(r, generation_prompt=True) for r in (example, without))
    np.testing.assert_array_equal(left.tokens, right.tokens)


def learnt_places(tokenizer, ids):
    """Places of the words of each assistant turn and of the token that ends it, found in the ids alone."""
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns, ids = [], list(ids)
    for begin in range(len(ids)):
        if ids[begin : begin + len(header)] == header:
            first = begin + len(header)
            turns.append(range(first, ids.index(end, first) + 1))
    return turns


@pytest.mark.parametrize("name", CHATS)
def test_the_loss_covers_exactly_the_words_of_the_assistant_and_the_end_token(tiny, name):
    example = tiny.processor.encode(CHATS[name])
    expected = np.zeros(example.length, np.float32)
    for turn in learnt_places(tiny.processor.tokenizer, example.tokens):
        expected[turn] = 1
    assert expected.sum() > 0
    np.testing.assert_array_equal(example.loss_weights, expected)


def test_every_turn_has_the_weight_that_its_example_gives_it(tiny):
    record = {
        "messages": [
            user("one?"),
            assistant("first"),
            user("two?"),
            assistant("second", loss=False),
            user("three?"),
            assistant("third", loss_scale=0.25),
            user("four?"),
            assistant("fourth", loss=True, loss_scale=2),
        ]
    }
    example = tiny.processor.encode(record)
    turns = learnt_places(tiny.processor.tokenizer, example.tokens)
    assert [set(example.loss_weights[t]) for t in turns] == [{1.0}, {0.0}, {0.25}, {2.0}]
    assert example.loss_weights.sum() == len(turns[0]) + 0.25 * len(turns[2]) + 2 * len(turns[3])
    assert [example.turns[t.start] for t in turns] == [1, 2, 3, 4]


def test_a_prompt_learns_nothing(tiny):
    assert not tiny.processor.encode(CHATS["text"], generation_prompt=True).loss_weights[-8:].any()


# Two ways in which other families' templates write: a different end of turn, and words that are stripped.
OTHER = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
)


def with_template(tiny, template):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = template
    return Processor(tokenizer, tiny.model.config)


def test_the_loss_follows_the_end_token_of_any_template(tiny):
    processor = with_template(tiny, OTHER)
    example = processor.encode({"messages": [user("hi"), assistant("a cat"), user("so"), assistant("no")]})
    learnt = processor.tokenizer.decode(example.tokens[example.loss_weights > 0])
    assert learnt == "a cat<|endoftext|>no<|endoftext|>"


def test_the_words_are_learnt_as_the_template_renders_them(tiny):
    processor = with_template(tiny, OTHER.replace("{{ m['content'] }}", "{{ m['content'] | trim | upper }}"))
    example = processor.encode({"messages": [user(" hi "), assistant("a cat "), user("so"), assistant("\nno")]})
    learnt = processor.tokenizer.decode(example.tokens[example.loss_weights > 0])
    assert learnt == "A CAT<|endoftext|>NO<|endoftext|>"


def test_a_template_under_which_the_words_are_not_found_is_refused_not_guessed(tiny):
    hidden = "{% if m['content'] == 'a cat' %}{{ messages | length }}{% else %}{{ m['content'] }}{% endif %}"
    processor = with_template(tiny, OTHER.replace("{{ m['content'] }}", hidden))
    processor.encode({"messages": [user("hi"), assistant("a dog")]})
    with pytest.raises(ExampleError, match="the chat template changes the words of an assistant turn"):
        processor.encode({"messages": [user("hi"), assistant("a cat"), user("so"), assistant("no")]})


def test_a_missing_template_is_chatml_as_qwen_writes_it(tiny):
    processor = with_template(tiny, None)
    for name in CHATS:
        np.testing.assert_array_equal(processor.encode(CHATS[name]).tokens, tiny.processor.encode(CHATS[name]).tokens)


def test_a_default_system_prompt_replaces_the_one_of_the_template(tiny):
    config = dataclasses.replace(tiny.processor.config, default_system="You are MiMo.")
    processor = Processor(tiny.processor.tokenizer, tiny.model.config, config)
    explicit = {"messages": [{"role": "system", "content": "You are MiMo."}, *CHATS["text"]["messages"]]}
    np.testing.assert_array_equal(processor.encode(CHATS["text"]).tokens, tiny.processor.encode(explicit).tokens)
    own = CHATS["a system prompt"]
    np.testing.assert_array_equal(processor.encode(own).tokens, tiny.processor.encode(own).tokens)


def test_an_example_has_its_own_limits_and_frame_rate(tiny):
    example = CHATS["one picture"]
    small = tiny.processor.encode({**example, "chat_template_kwargs": {"max_pixels": 4 * 784}})
    assert small.sizes == (((140, 84), (56, 28)),)
    frames = {"messages": [user("<video>?"), assistant("a cat")], "videos": [[picture(56, 56, i) for i in range(4)]]}
    limits = {"video_min_pixels": 784, "video_max_pixels": 4 * 784}
    slow, fast = (tiny.processor.encode({**frames, "chat_template_kwargs": {**limits, "fps": f}}) for f in (1.0, 2.0))
    steps = [np.diff(np.unique(e.positions[e.vision_index >= 0, 0])).tolist() for e in (slow, fast)]
    assert steps == [[4], [2]]


BOXED = {
    "messages": [user("<image>where is <ref-object>? and <ref-object>?"), assistant("<bbox> and <bbox>")],
    "images": [picture(200, 100)],
    "objects": {"ref": ["the cat", "a dog"], "bbox": [[20, 10, 100, 50], [0, 0, 200, 100]]},
}


def answer(processor, record):
    example = processor.encode(record)
    return example, processor.tokenizer.decode(example.tokens[example.loss_weights > 0])


@pytest.mark.parametrize("form", ["json", "qwen_tokens"])
def test_boxes_are_written_in_pixels_of_the_resized_picture_and_read_back(tiny, form):
    config = dataclasses.replace(tiny.processor.config, box_format=form)
    processor = Processor(tiny.processor.tokenizer, tiny.model.config, config)
    example, text = answer(processor, BOXED)
    ((original, resized),) = example.sizes
    assert (original, resized) == ((200, 100), (196, 112))
    found = [item.region for item in processor.read_regions(text)]
    assert found == [Box(20, 11, 98, 56, "resized"), Box(0, 0, 196, 112, "resized")]
    assert text.startswith("[20, 11, 98, 56]" if form == "json" else "<|box_start|>(20,11),(98,56)<|box_end|>")
    question = tiny.processor.tokenizer.decode(example.tokens[example.loss_weights == 0])
    assert "where is the cat? and a dog?" in question


def test_boxes_given_as_shares_and_points_land_in_the_same_pixels(tiny):
    example = {**BOXED, "objects": {**BOXED["objects"], "bbox": [[0.1, 0.1, 0.5, 0.5], [1, 1]], "bbox_type": "norm1"}}
    assert answer(tiny.processor, example)[1].startswith("[20, 11, 98, 56] and [196, 112]")


@pytest.mark.parametrize(
    ("form", "space", "expected"),
    [
        ("ferret", None, "[100, 100, 500, 500] and [0, 0, 999, 999]"),
        ("mm1_5", None, "<100,100,500,500> and <0,0,999,999>"),
        ("json", "norm1000", "[100, 100, 500, 500] and [0, 0, 999, 999]"),
        ("json", "original", "[20, 10, 100, 50] and [0, 0, 200, 100]"),
    ],
)
def test_boxes_are_written_in_the_format_and_space_of_the_configuration(tiny, form, space, expected):
    config = dataclasses.replace(tiny.processor.config, box_format=form, box_space=space)
    assert answer(Processor(tiny.processor.tokenizer, tiny.model.config, config), BOXED)[1].startswith(expected)


def test_a_box_is_scaled_by_the_picture_it_is_on(tiny):
    example = {
        **BOXED,
        "messages": [user("<image><image><ref-object><ref-object>"), assistant("<bbox><bbox>")],
        "images": [picture(200, 100), picture(56, 84)],
        "objects": {"ref": ["a", "b"], "bbox": [[28, 28, 56, 84], [20, 10, 100, 50]], "image_id": [1, 0]},
    }
    assert answer(tiny.processor, example)[1].startswith("[28, 28, 56, 84][20, 11, 98, 56]")


ORIGIN = Origin("examples.jsonl", 3)
REFUSED = {
    "a corrupt picture": ({**CHATS["one picture"], "images": [b"\x89PNG broken"]}, "images[0]", "cannot be decoded"),
    "a missing file": ({**CHATS["one picture"], "images": ["gone.png"]}, "images[0]", "file not found; tried"),
    "a URL": ({**CHATS["one picture"], "images": ["https://x.org/a.png"]}, "images[0]", "is a URL"),
    "too flat a picture": ({**CHATS["one picture"], "images": [picture(1000, 4)]}, "images[0]", "exceeds 200"),
    "limits that contradict": (
        {**CHATS["one picture"], "chat_template_kwargs": {"min_pixels": 10**6}},
        "images[0]",
        "min_pixels 1000000 exceeds max_pixels",
    ),
    "frames of different sizes": (
        {"messages": [user("<video>"), assistant("a")], "videos": [[picture(56, 56), picture(84, 56)]]},
        "videos[0]",
        "frames of different sizes [(56, 56), (84, 56)]",
    ),
    "a corrupt frame": (
        {"messages": [user("<video>"), assistant("a")], "videos": [[picture(56, 56), b"x"]]},
        "videos[0]",
        "cannot be decoded",
    ),
    "a box outside the picture": (
        {**BOXED, "objects": {**BOXED["objects"], "bbox": [[20, 10, 100, 50], [0, 0, 201, 100]]}},
        "objects.bbox[1]",
        "[0, 0, 201, 100] is outside the image of 200 x 100",
    ),
    "a box without a picture": (
        {"messages": [user("?"), assistant("<bbox>")], "objects": {"bbox": [[1, 2, 3, 4]]}},
        "objects.bbox[0]",
        "a box without an image",
    ),
    "a literal image token": (
        {"messages": [user("what is <|image_pad|>?"), assistant("a")]},
        "messages",
        "1 media tokens in the text for 0 media",
    ),
    "a literal video token beside a picture": (
        {**CHATS["one picture"], "messages": [user("<image><|video_pad|>"), assistant("a")]},
        "messages",
        "2 media tokens in the text for 1 media",
    ),
    "a literal token in the answer": (
        {"messages": [user("?"), assistant("<|image_pad|>")]},
        "messages",
        "1 media tokens in the text for 0 media",
    ),
    "a picture in an answer": (
        {"messages": [user("draw"), assistant("<image>")], "images": [picture(56, 56)]},
        "messages",
        "without media tags",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_example_that_cannot_be_used_names_itself_and_the_field(tiny, kind):
    example, field, says = REFUSED[kind]
    with pytest.raises(ExampleError) as caught:
        tiny.processor.encode(parse_example(example, ORIGIN))
    assert str(caught.value).startswith(f"examples.jsonl, line 3, field {field!r}: ")
    assert says in str(caught.value)
    assert caught.value.fix


def test_media_are_found_beside_their_data_file_and_in_the_roots(tiny, tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    picture(56, 56).save(tmp_path / "data" / "images" / "a.png")
    picture(84, 56).save(tmp_path / "root" / "b.png")
    processor = Processor(tiny.processor.tokenizer, tiny.model.config, media_roots=(str(tmp_path / "root"),))
    record = {"messages": [user("<image><image>"), assistant("a")], "images": ["images/a.png", "b.png"]}
    example = processor.encode(parse_example(record, Origin(str(tmp_path / "data" / "examples.jsonl"), 1)))
    assert [original for original, _ in example.sizes] == [(56, 56), (84, 56)]


def test_settings_survive_their_file(tmp_path):
    from jvlm.data.processor_config import SETTINGS, read_settings

    config = ProcessorConfig(QwenImageConfig(max_pixels=50176, fps=1.0), "qwen_tokens", default_system="be brief")
    (tmp_path / SETTINGS).write_text(json.dumps(config_tree.to_dict(config)))
    assert read_settings(tmp_path) == config


def test_every_media_token_has_its_feature_and_no_other_token_has_one(tiny):
    record = {
        "messages": [user("<image><video><image>"), assistant("a")],
        "images": [picture(140, 84), picture(56, 112)],
        "videos": [[picture(84, 84, i) for i in range(3)]],
        "chat_template_kwargs": {"video_min_pixels": 784, "video_max_pixels": 9 * 784},
    }
    example = tiny.processor.encode(record)
    config = tiny.model.config
    is_media = np.isin(example.tokens, [config.image_token_id, config.video_token_id])
    np.testing.assert_array_equal(example.vision_index >= 0, is_media)
    counts = [15, 18, 8]
    assert sorted(example.vision_index[is_media]) == list(range(sum(counts)))
    assert example.num_patches == 4 * sum(counts)
    ends = np.cumsum(counts)
    for begin, end in itertools.pairwise([0, *ends]):
        assert sorted(example.vision_index[is_media][begin:end]) == list(range(begin, end))
    assert example.patch_segment_ids[-1] == 4
    kinds = [config.image_token_id, config.video_token_id, config.image_token_id]
    assert [int(example.tokens[is_media][i]) for i in (0, 15, 33)] == kinds
