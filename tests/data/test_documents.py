"""Documents: ids of every family against transformers' processors, which tokens have a loss, and how they are cut."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoTokenizer

from jvlm.data import cutting, pipeline
from jvlm.data.config import DataConfig
from jvlm.data.cutting import Beginning, Limits
from jvlm.data.document_config import DocumentConfig
from jvlm.data.encode import Encode
from jvlm.data.errors import ExampleError, Origin, Rejected
from jvlm.data.examples import parse_example
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.models.connectors.c_abstractor import CAbstractorConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import hf
from tests import idefics2
from tests.data.document_blocks import image, page, words
from tests.support import Tiny, image_processor, picture, token_ids

START, PAD, STOP = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def fake_tokens(request, tmp_path_factory):
    """A tiny Idefics2, whose pictures are whole or split."""
    folder = tmp_path_factory.mktemp("idefics2")
    values = idefics2.write_folder(folder, split=request.param)
    return Tiny(folder, values, None, None, hf.load_processor(folder, hf.read_config(folder)))


@pytest.fixture(scope="module")
def tiles(tokenizer_folder):
    """A tiny MM1.5 that splits pictures into four tiles and an overview."""
    ids = token_ids(tokenizer_folder)
    model = VLMConfig(
        family="mm1_5",
        encoder=ViTConfig(
            depth=1, hidden_size=8, num_heads=1, intermediate_size=8, patch_size=4, grid=4, class_token=True
        ),
        connector=CAbstractorConfig(grid=4, out_grid=2),
        decoder=TransformerConfig(vocab_size=352),
        image_token_id=ids[PAD],
        video_token_id=ids["<|video_pad|>"],
    )
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    return Processor(tokenizer, model, ProcessorConfig(image=TiledImageConfig(splitting="static")))


PAGES = {
    "text alone": page(words("is there a dog? no, none.")),
    "a caption": page(image(), words("a cat on the chair")),
    "a picture between words, and one at the end": page(words("the box "), image(), words("\n\nis red."), image(1)),
    "pictures side by side": page(image(), image(1, (56, 84)), words("both"), image(2), image(3)),
    "several texts in a row": page(words("the "), words("cat\n"), words("\ndog"), image(), words(" runs")),
    "odd characters": page(
        words("caf\u00e9 cafe\u0301 \U0001f600"), image(), words("\u56fe\u7247 \U0001f600\U0001f680")
    ),
}


def tagged(record, tag):
    return "".join(block["text"] if block["type"] == "text" else tag for block in record["document"])


def pictures(record):
    return [block["image"] for block in record["document"] if block["type"] == "image"]


@pytest.mark.parametrize("name", PAGES)
def test_qwens_ids_are_those_of_transformers_and_the_end_of_text(tiny, name):
    record, tokenizer = PAGES[name], AutoTokenizer.from_pretrained(str(tiny.folder))
    text = tagged(record, f"{START}{PAD}{STOP}")
    if pictures(record):
        grids = image_processor(tiny.folder)(pictures(record), return_tensors="np")["image_grid_thw"]
        first, *rest = text.split(PAD)
        text = first + "".join(PAD * int(np.prod(grid) // 4) + piece for grid, piece in zip(grids, rest, strict=True))
    expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    example = tiny.processor.encode(record)
    assert example.tokens.tolist() == expected
    spelled = tokenizer.convert_ids_to_tokens(expected)
    np.testing.assert_array_equal(example.loss_weights, [t not in (START, PAD, STOP) for t in spelled])
    np.testing.assert_array_equal(example.vision_index >= 0, [t == PAD for t in spelled])


@pytest.mark.parametrize("name", PAGES)
def test_idefics2s_ids_are_those_of_transformers_and_the_end_of_text(fake_tokens, name):
    record, processor = PAGES[name], fake_tokens.processor
    theirs = idefics2.hf_processor(fake_tokens.folder)
    inputs = theirs(text=tagged(record, idefics2.IMAGE), images=pictures(record) or None, return_tensors="np")
    example = processor.encode(record)
    assert example.tokens.tolist() == [*inputs["input_ids"][0].tolist(), processor.tokenizer.eos_token_id]
    spelled = processor.tokenizer.convert_ids_to_tokens(example.tokens.tolist())
    media = (idefics2.FAKE, idefics2.IMAGE, "<s>")
    np.testing.assert_array_equal(example.loss_weights, [token not in media for token in spelled])


def test_a_tokenizer_of_llamas_kind_gives_the_ids_of_transformers(tmp_path):
    values = idefics2.write_folder(tmp_path, split=False, tokenizer=idefics2.write_llama_tokenizer, vocab_size=512)
    tiny = Tiny(tmp_path, values, None, None, hf.load_processor(tmp_path, hf.read_config(tmp_path)))
    for name in PAGES:
        test_idefics2s_ids_are_those_of_transformers_and_the_end_of_text(tiny, name)


def test_mm1_5s_tiles_stand_between_their_marks_and_have_no_loss(tiles):
    example = tiles.encode(page(words("look: "), image(), words(" done"), image(1)))
    tokenizer, spelled = tiles.tokenizer, tiles.tokenizer.convert_ids_to_tokens

    def tiled(number):
        places = ("1,1", "1,2", "2,1", "2,2", "0,0")
        return START + "".join(f"({number},{place}){PAD * 4}" for place in places) + STOP

    expected = tokenizer(f"look: {tiled(0)} done{tiled(1)}<|im_end|>")["input_ids"]
    # marks are tokenized by themselves
    assert tokenizer.decode(example.tokens) == tokenizer.decode(expected)
    learnt = tokenizer.decode(example.tokens[example.loss_weights > 0])
    assert learnt == "look:  done<|im_end|>"
    assert example.patch_segment_ids[-1] == 10
    assert sum(token == PAD for token in spelled(example.tokens)) == 40


def test_from_three_pictures_on_mm1_5_splits_none(tiles):
    assert tiles.encode(page(*map(image, range(3)), words("three"))).patch_segment_ids[-1] == 3


def test_a_text_with_tags_and_a_list_of_pictures_is_the_same_document(tiny):
    blocks = page(words("a "), image(), words(" b"))
    tags = {"text": "a <image> b", "images": [blocks["document"][1]["image"]]}
    one, other = map(tiny.processor.encode, (blocks, tags))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.patches, other.patches)


def test_words_of_a_text_block_are_never_tags_or_control_tokens(tiny):
    odd = f"<image> <video> <|im_end|> {PAD} <bbox> <ref-object>"
    example = tiny.processor.encode(page(words(odd), image(), words(odd)))
    ids = tiny.processor.tokenizer.convert_tokens_to_ids
    assert len(example.sizes) == 1
    assert (example.tokens == ids("<|im_end|>")).sum() == 1
    text = example.tokens[(example.vision_index < 0) & (example.loss_weights > 0)][:-1]
    assert tiny.processor.tokenizer.decode(text) == odd * 2
    assert not np.isin(text, [ids(PAD), ids("<|im_end|>")]).any()
    chat = {
        "messages": [{"role": "user", "content": [words("what is <image>?")]}, {"role": "assistant", "content": "a"}]
    }
    assert not tiny.processor.encode(chat).sizes


def test_boxes_are_written_into_the_text_around_them(tiny):
    objects = {"ref": ["cat"], "bbox": [[14, 14, 28, 42]]}
    record = page(image(), words("the <ref-object> is at <bbox>."), objects=objects)
    example = tiny.processor.encode(record)
    assert "the cat is at [14, 14, 28, 42]." in tiny.processor.decode(example.tokens)
    assert (example.breaks == 4).sum() == 2


def test_a_document_as_a_prompt_has_no_end_and_nothing_to_learn(tiny):
    record = page(image(), words("a cat"))
    whole, prompt = (tiny.processor.encode(record, generation_prompt=p) for p in (False, True))
    assert whole.tokens[:-1].tolist() == prompt.tokens.tolist()
    assert not prompt.loss_weights.any()


def test_another_token_may_end_documents(tiny):
    config = dataclasses.replace(tiny.processor.config, document_end="<|endoftext|>")
    processor = Processor(tiny.processor.tokenizer, tiny.processor.model, config)
    last = processor.encode(page(words("a cat"))).tokens[-1]
    assert processor.tokenizer.convert_ids_to_tokens(int(last)) == "<|endoftext|>"


BAD = {
    "no blocks": (page(), "'document': .* is empty"),
    "no list": ({"document": "a cat"}, "'document': 'a cat' is not a list of blocks"),
    "a text that is none": ({"text": 5}, "'text': a int is not text"),
    "two documents": ({"document": [words("a")], "text": "b"}, "'text': given together with 'document'"),
    "a picture without a tag": ({"text": "a", "images": ["a.png"]}, "0 <image> tags but 1 entries"),
    "tools": (page(words("a"), tools=[]), "'tools': a document has no chat template"),
    "an unknown loss": (page(words("a"), loss="some"), "'loss': 'some' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_refused_with_its_field(name):
    record, said = BAD[name]
    with pytest.raises(ExampleError, match=said):
        parse_example(record)


def encoded(tiny, record, rng=None, **fields):
    config = DataConfig(**{"seq_len": 512, "max_patches": 512, "on_bad_example": "error", **fields})
    encode = Encode(tiny.processor, config)
    return encode.random_map((Origin("pages.jsonl", 7), record), rng or np.random.default_rng(0))


@pytest.mark.parametrize(
    ("record", "loss"),
    [(page(words("a")), "answers"), (page(words("a")), "last_answer"), (page(words("a"), loss="answers"), None)],
)
def test_a_loss_on_answers_of_a_document_is_an_error(tiny, record, loss):
    with pytest.raises(
        ExampleError, match=r"pages.jsonl, line 7, field 'loss': '.*answers?' of a document, which has no"
    ):
        encoded(tiny, record, loss=loss)


def test_a_loss_that_a_document_gives_itself_comes_first(tiny):
    (example,) = encoded(tiny, page(words("a"), loss="all"), loss="answers")
    assert example.loss_weights.all()


def test_a_document_of_pictures_alone_has_nothing_to_learn(tiny):
    with pytest.raises(ExampleError, match="'document': no text, so nothing has a loss"):
        encoded(tiny, page(image(), words(" \n")))


BLOCKS = st.one_of(
    st.builds(words, st.text("ab \n\U0001f600\u00e9", min_size=1, max_size=24)),
    st.builds(image, st.integers(0, 3), st.sampled_from([(56, 56), (56, 84)])),
)


def joined(parts, name):
    return np.concatenate([getattr(part, name) for part in parts])


@pytest.mark.parametrize("family", ["qwen", "idefics2"])
@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(BLOCKS, min_size=1, max_size=8), tokens=st.integers(6, 40), patches=st.sampled_from([24, 40, 200])
)
def test_parts_hold_every_token_and_patch_once_and_fit(request, family, blocks, tokens, patches):
    tiny = request.getfixturevalue("tiny" if family == "qwen" else "fake_whole")
    processor = tiny.processor
    beginning = Beginning(processor.documents.begin_ids, processor.merged_delimiter_id)
    whole = processor.encode(page(*blocks))
    parts = cutting.split(whole, Limits(tokens, patches), beginning)
    text = [part.tokens[part.loss_weights > 0] for part in parts]
    np.testing.assert_array_equal(np.concatenate(text), whole.tokens[whole.loss_weights > 0])
    for name in ("patches", "patch_positions"):
        np.testing.assert_array_equal(joined(parts, name), getattr(whole, name))
    assert sum((part.sizes for part in parts), ()) == whole.sizes
    assert [part.records for part in parts] == [1] + [0] * (len(parts) - 1)
    for part in parts:
        fits = part.length <= tokens and part.num_patches <= patches
        assert fits or (len(part.sizes) == 1 and not part.loss_weights[:-1].any())
        assert set(np.unique(part.loss_weights)) <= {0.0, 1.0}
        assert part.tokens[: len(beginning.ids)].tolist() == list(beginning.ids)
        # what packing and the towers rely on
        assert len(part.patches) == len(part.patch_segment_ids) == len(part.patch_window_ids)
        if len(part.patches):
            assert part.patch_segment_ids[0] == part.patch_window_ids[0] == part.vision_segment_ids[0] == 1
            assert part.vision_index.max() + 1 == len(part.vision_segment_ids)
        assert part.positions[0].tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def fake_whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    values = idefics2.write_folder(folder, split=False)
    return Tiny(folder, values, None, None, hf.load_processor(folder, hf.read_config(folder)))


ARRAYS = "tokens positions loss_weights vision_index media vision_segment_ids".split()
ARRAYS += "patches patch_segment_ids patch_window_ids patch_positions".split()


def test_a_part_is_what_its_pieces_alone_are(tiny):
    blocks = [
        words("the cat. "),
        image(),
        words("sat"),
        image(1, (56, 84)),
        image(2),
        words("on "),
        words("it."),
        image(),
    ]
    whole = tiny.processor.encode(page(*blocks))
    parts = cutting.split(whole, Limits(18, 40), Beginning())
    assert len(parts) > 2
    at, document = 0, parse_example(page(*blocks))
    for part in parts:
        length = next(n for n in range(1, 9) if tiny.processor.encode(
            dataclasses.replace(document, content=document.content[at : at + n], ends=at + n == 8)
        ).length == part.length)  # fmt: skip
        alone = dataclasses.replace(document, content=document.content[at : at + length], ends=at + length == 8)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(part, name), getattr(tiny.processor.encode(alone), name), name)
        at += length
    assert at == 8


def test_neighbouring_pictures_that_are_cut_apart_each_have_both_delimiters(fake_whole):
    processor = fake_whole.processor
    whole = processor.encode(page(image(), image(1), words("two")))
    limit = Limits(8, 999)
    first, second, *_ = cutting.split(
        whole, limit, Beginning(processor.documents.begin_ids, processor.merged_delimiter_id)
    )
    spelled = [processor.tokenizer.convert_ids_to_tokens(part.tokens) for part in (first, second)]
    span = [idefics2.FAKE, *[idefics2.IMAGE] * 4, idefics2.FAKE]
    assert spelled[0] == ["<s>", *span]
    assert spelled[1] == ["<s>", *span]


@pytest.mark.parametrize("cut", ["split", "sample_window"])
def test_no_part_has_more_pictures_than_it_may(tiny, cut):
    record = page(*(block for n in range(7) for block in (words(f"page {n} "), image(n))))
    fields = {"documents": DocumentConfig(cut=cut, max_images=3)}
    found = encoded(tiny, record, **fields)
    assert [len(example.sizes) for example in found] == ([3, 3, 1] if cut == "split" else [3])
    assert [example.records for example in found] == ([1, 0, 0] if cut == "split" else [1])
    assert all(example.made_to_fit == "cut" for example in found)
    if cut == "split":
        whole = tiny.processor.encode(record)
        text = np.concatenate([example.tokens[example.loss_weights > 0] for example in found])
        np.testing.assert_array_equal(text, whole.tokens[whole.loss_weights > 0])


def test_windows_begin_at_any_piece_from_which_they_are_full_and_more_often_before_pictures(tiny):
    blocks = [words(f"{n} is the cat. ") for n in range(12)]
    blocks.insert(4, image())
    example, rng, begins = tiny.processor.encode(page(*blocks)), np.random.default_rng(0), []
    for _ in range(500):
        part = cutting.window(example, Limits(40, 512), Beginning(), 2.0, rng)
        assert 25 < part.length <= 40
        assert (part.records, part.made_to_fit) == (1, "cut")
        text = tiny.processor.decode(part.tokens)
        begins.append(-1 if part.media[:2].any() else int(text.split()[0]))
    counts = [begins.count(begin) for begin in range(-1, max(begins) + 1)]
    # the first window that reaches the end begins at the seventh text; the picture stands behind the fourth
    assert len(counts) == 8
    weights = np.array([3, 1, 1, 1, 3, 1, 1, 1])
    assert stats.chisquare(counts, weights / weights.sum() * 500).pvalue > 0.01


def test_a_document_that_is_never_cut_is_too_long(tiny):
    record = page(words("the cat. " * 50))
    (left,) = encoded(tiny, record, seq_len=64, documents=DocumentConfig(cut="never"))
    assert isinstance(left, Rejected)
    assert left.kind == "too_long"


def test_pictures_too_large_for_any_part_are_shrunk_or_left_out_and_the_text_stays(tiny):
    record = page(words("before "), image(0, (112, 112)), words("after"))
    before, left, after = encoded(tiny, record, seq_len=64, max_patches=32)
    assert isinstance(left, Rejected)
    assert "64 patches do not fit 32" in left.reason
    _, left, _ = encoded(tiny, record, seq_len=12, max_patches=128)
    assert (left.field, "turns" in left.fix) == ("document", False)  # it has none that could be left out
    assert "tokens do not fit 12" in left.reason
    assert tiny.processor.decode(np.concatenate([before.tokens, after.tokens])).split() == ["before", "after"]
    found = encoded(tiny, record, seq_len=64, max_patches=32, on_too_long="shrink")
    assert sum(example.num_patches for example in found) <= 32
    assert sum(len(example.sizes) for example in found) == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for number in range(6):
        picture(56, 56, number).save(folder / f"{number}.png")
    records = [
        {"document": [words(f"page {n} "), {"type": "image", "image": f"{n}.png"}, words(" the cat." * 8 * n)]}
        for n in range(6)
    ]
    records += [{"text": f"text {n} alone"} for n in range(5)]
    records += [{"text": f"<image>circle {n}", "images": [f"{n}.png"]} for n in range(5)]
    path = folder / "pages.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CONFIG = {"batch_size": 2, "seq_len": 64, "max_patches": 64, "pack_window": 4}


def batches(tiny, path, *, seed=0, start=None, count=None, **fields):
    config = DataConfig(train=(str(path),), **{**CONFIG, **fields})
    stream = iter(pipeline.training_data(tiny.processor, config, seed=seed, epochs=2)[0])
    if start is not None:
        stream.set_state(start)
    found = []
    while count is None or len(found) < count:
        try:
            found.append(next(stream))
        except StopIteration:
            break
    return found, stream.get_state()


@pytest.mark.parametrize("cut", ["split", "sample_window"])
def test_every_document_comes_once_an_epoch_and_a_run_goes_on_as_if_unbroken(tiny, files, cut):
    fields = {"documents": DocumentConfig(cut=cut)}
    whole, _ = batches(tiny, files, **fields)
    assert sum(one.conversations for one in whole) == 2 * 16
    assert sum(one.parts for one in whole) > 0
    assert any(not one.batch.patch_segment_ids.any() for one in batches(tiny, files, batch_size=1)[0])  # text alone
    for stop in (1, 4):
        first, state = batches(tiny, files, count=stop, **fields)
        rest, _ = batches(tiny, files, start=state, **fields)
        for one, other in zip(whole, [*first, *rest], strict=True):
            np.testing.assert_array_equal(one.batch.tokens, other.batch.tokens)
            np.testing.assert_array_equal(one.batch.patches, other.batch.patches)
            np.testing.assert_array_equal(one.batch.loss_weights, other.batch.loss_weights)


def test_a_shard_of_documents_is_read_as_their_file(tiny, files, tmp_path):
    from jvlm.data.conversion import convert

    convert([str(files)], str(tmp_path / "shards"), examples_per_shard=100)
    one, other = (batches(tiny, path, shuffle="none")[0] for path in (files, tmp_path / "shards" / "*.arrayrecord"))
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.batch.tokens, right.batch.tokens)
        np.testing.assert_array_equal(left.batch.patches, right.batch.patches)


def test_a_check_counts_documents_and_their_parts(tiny, files):
    from jvlm.data.check import check

    report = check([str(files)], tiny.processor, DataConfig(**CONFIG))
    # paths are relative to the file, so that only its texts can be encoded here
    lengths = {
        n: len(tiny.processor.tokenizer(f"page {n} " + " the cat." * 8 * n)["input_ids"]) + 6 + 1 for n in range(6)
    }
    cut = [n for n, length in lengths.items() if length > 64]
    assert (report.usable, report.documents, report.cut) == (16, 16, len(cut))
    assert 2 * len(cut) <= report.parts
    assert report.changed == 0
    assert f"16 documents, {report.cut} of them cut into {report.parts} parts" in report.text()
    text = sum(len(tiny.processor.tokenizer(f"text {n} alone")["input_ids"]) + 1 for n in range(5))
    captions = sum(len(tiny.processor.tokenizer(f"circle {n}")["input_ids"]) + 7 for n in range(5))
    assert sum(report.tokens) == sum(lengths.values()) + text + captions
