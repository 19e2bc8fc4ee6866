"""`jvlm data view`: its counts are those of a brute force, and its page shows what it should and asks for nothing."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data import encode, pipeline
from jvlm.data.boxes import Box
from jvlm.data.check import check
from jvlm.data.mixture.config import Mixture, Phase, Source
from jvlm.data.processor import Processor
from jvlm.data.view import page, sample
from jvlm.data.view.histogram import COLOURS, WIDTH, histogram
from jvlm.data.view.run_view import RunView, run_view
from jvlm.errors import UserError
from tests.training import support

HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>"><img src=http://evil.example/y>'


def _chat(*turns: str, **fields) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], **fields}


GOOD = [
    _chat("<image>what color?", "red", images=["red.png"]),
    _chat("is there a red shape?", "no", "is it a circle?", "yes"),
    _chat(HOSTILE, HOSTILE),
    _chat("<image>where?", "<bbox>", images=["copy.png"], objects={"bbox": [[30, 20, 90, 40]]}),
    _chat("<image><image>what color?", "red red", images=["red.png", "blue.png"]),
]
BAD = [_chat(HOSTILE), _chat("what color? " * 60, HOSTILE), _chat("<image>", "red", images=["gone.png"])]


class _Page(html.parser.HTMLParser):
    """Tags that are open, everything that a browser would load, and the cells of tables."""

    VOID = ("meta", "br", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loaded, self.cells, self.tags, self.spans = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data", "srcset", "action", "style")]
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")
        if tag == "span":
            self.spans.append((dict(attrs).get("class", ""), ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "td":
            self.cells[-1] += data
        if self.open and self.open[-1][0] == "span":
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, processor, configuration of two files)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("view")
    Image.new("RGB", (120, 60), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (120, 60), (0, 0, 255)).save(folder / "blue.png")
    shutil.copy(folder / "red.png", folder / "copy.png")
    for name, examples in {"a": GOOD + BAD, "b": GOOD[:2] * 4 + BAD[:1]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    experiment = support.experiment(folder, folder / "a.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(str(experiment.tokenizer), local_files_only=True)
    files = (str(folder / "a.jsonl"), str(folder / "b.jsonl"))
    config = dataclasses.replace(experiment.data, train=files, on_bad_example="skip", single_turn_ratio=0.5)
    return folder, Processor(tokenizer, experiment.model, experiment.processor), config


@pytest.fixture(scope="module")
def view(data) -> RunView:
    _, processor, config = data
    return run_view("data", config, processor, seed=0, samples=20)


@pytest.fixture(scope="module")
def text(view) -> str:
    return page.render([view]).decode()


def _brute_force(data, name: str) -> dict[str, float]:
    """Counts of a file by encoding each of its examples; those rejected but for their length are not encoded."""
    folder, processor, _ = data
    processor = processor.replace(media_roots=(str(folder),))
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    readable = [r for r in records if len(r["messages"]) > 1 and "gone.png" not in r.get("images", ())]
    encoded = [processor.encode(record) for record in readable]
    usable = [one for one in encoded if one.length <= 192 and one.num_patches <= 192]
    tokens = sum(one.length for one in encoded)
    return {
        "examples": len(records),
        "usable": len(usable),
        "rejected": len(records) - len(usable),
        "tokens": tokens,
        "loss": sum(int((one.loss_weights > 0).sum()) for one in encoded) / tokens,
        "patches": sum(one.num_patches for one in encoded),
        "images": sum(len(record.get("images", ())) for record in records) / len(records),
    }


def test_counts_are_those_of_a_brute_force_and_of_data_check(data, view, text):
    _, processor, config = data
    for row, name in zip(view.rows, ("a", "b"), strict=True):
        expected = _brute_force(data, name)
        assert {key: getattr(row, key) for key in expected} == pytest.approx(expected)
        assert row.name == f"{name}.jsonl"
        assert 0 < row.usable < row.examples
    report = check(config.train, processor, config)
    assert (view.total.examples, view.total.usable) == (report.examples, report.usable)
    assert (view.total.tokens, view.total.patches) == (sum(report.tokens), sum(report.patches))
    assert view.total.loss == report.loss_tokens / sum(report.tokens)
    assert view.reports == (("data", report.text()),)
    cells = _Page(text).cells
    for row in [*view.rows, view.total]:
        start = cells.index(row.name)
        numbers = [row.examples, row.usable, row.rejected, row.tokens]
        assert cells[start + 1 : start + 5] == [f"{number:,}" for number in numbers]


def test_histograms_hold_every_value_and_the_limits(view):
    by_title = {h.title.split()[0]: h for h in view.histograms}
    for name, row in zip(("a.jsonl", "b.jsonl"), view.rows, strict=True):
        rejected_early = 2 if name == "a.jsonl" else 1
        assert sum(by_title["Tokens"].counts[name]) == row.examples - rejected_early
        assert sum(by_title["Images"].counts[name]) == row.examples
    assert [mark[1] for mark in by_title["Tokens"].marks] == ["seq_len 192"]
    assert by_title["Patches"].marks[0][1].startswith("max_patches 192")
    assert by_title["Assistant"].counts["b.jsonl"][:3] == [0, 4, 4]
    drawn = histogram("x", {"one": [0, 3, 3, 99], "two": [3]}, {"limit": [1000]})
    assert (drawn.counts["one"][0], sum(drawn.counts["one"]), drawn.highest) == (3, 4, 4)
    assert drawn.marks[0][1] == "limit 1,000, beyond the axis"
    assert histogram("x", {"one": []}, {"limit": [8]}).highest == 0
    assert [text for _, text in histogram("x", {"one": [0, 1]}).ticks] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert [text for _, text in histogram("x", {"one": [279]}).ticks] == ["0", "50", "100", "150", "200", "250"]


def test_rejected_examples_are_grouped_with_their_text_and_fix(view):
    assert sum(fault.count for fault in view.faults) == view.total.rejected
    by_reason = {fault.reason: fault for fault in view.faults}
    (unanswered,) = (fault for reason, fault in by_reason.items() if "no assistant turn" in reason)
    assert (unanswered.count, unanswered.sources) == (2, {"a.jsonl": 1, "b.jsonl": 1})
    assert [example.origin for example in unanswered.examples] == ["a.jsonl, line 6", "b.jsonl, line 9"]
    assert unanswered.fix == "Add one, or set its loss true"
    assert json.loads(unanswered.examples[0].record) == BAD[0]
    assert any("tokens do not fit 192" in reason for reason in by_reason)


def test_samples_show_the_tokens_with_a_loss_and_regions_in_the_pixels_of_the_encoder(data, view):
    folder, processor, _ = data
    samples = view.samples["a.jsonl"]
    assert len(samples) == len(GOOD)
    assert "most images" in samples[4].why
    boxed = processor.replace(media_roots=(str(folder),)).encode(GOOD[3])
    spans, (picture,) = samples[3].spans, samples[3].pictures
    loss = [int(token) for token, weight in zip(boxed.tokens, boxed.loss_weights, strict=True) if weight > 0]
    assert "".join(span.text for span in spans if span.weight > 0) == processor.tokenizer.decode(loss)
    assert [span.kind for span in spans].count("media") == 1
    assert any(span.kind == "special" and "<|im_end|>" in span.text for span in spans)
    ((width, height),) = (size.resized for size in boxed.sizes)
    assert (picture.width, picture.height) == (width, height)
    assert picture.boxes == (Box(30 * width / 120, 20 * height / 60, 90 * width / 120, 40 * height / 60, "resized"),)
    shown = Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))
    assert (shown.format, max(shown.size) <= 200) == ("JPEG", True)


def test_a_long_text_is_cut_and_tokens_of_images_do_not_count(data, monkeypatch):
    folder, processor, config = data
    encoded = processor.replace(media_roots=(str(folder),)).encode(GOOD[0])
    text = encoded.tokens[encoded.media == 0]
    monkeypatch.setattr(sample, "_TOKENS", len(text) - 2)
    config = dataclasses.replace(config, train=config.train[:1])
    first = run_view("data", config, processor, seed=0, samples=20).samples["a.jsonl"][0]
    assert first.title == "a.jsonl, line 1"
    assert "".join(s.text for s in first.spans if s.kind != "media") == processor.tokenizer.decode(text[:-2])
    assert first.left_out == "2 more tokens"


@pytest.mark.parametrize(
    ("record", "policy", "fact"),
    [
        (_chat("what color?", "red", "is it a circle? " * 60, "yes"), "truncate", ", truncated"),
        (_chat("<image>" * 5 + "what color?", "red", images=["large.png"] * 5), "shrink", ", shrunk"),
        ({"document": [{"type": "text", "text": "is it a circle? " * 20}] * 3}, "drop", ", cut into 3 parts"),
        (_chat("<video>what color?", "red", videos=[["red.png", "blue.png"]]), "drop", " patches"),
    ],
)
def test_an_example_is_shown_as_it_is_made_to_fit(data, record, policy, fact):
    folder, processor, config = data
    Image.new("RGB", (240, 240), (0, 0, 255)).save(folder / "large.png")
    (folder / "one.jsonl").write_text(json.dumps(record) + "\n")
    config = dataclasses.replace(config, train=(str(folder / "one.jsonl"),), on_too_long=policy)
    view = run_view("data", config, processor, seed=0, samples=1)
    (one,) = view.samples["one.jsonl"]
    assert one.facts.endswith(fact)
    _Page(page.render([view]).decode())
    if policy == "shrink":
        assert len(one.pictures) == 5
        assert sum(picture.width * picture.height for picture in one.pictures) <= 192 * 8 * 8
    if policy == "truncate":
        assert "is it a circle" not in "".join(span.text for span in one.spans)
    if "videos" in record:
        assert [picture.name.partition(":")[0] for picture in one.pictures] == ["frame of video 1"] * 2


def test_equal_images_are_found_by_their_bytes_over_all_sources(data, view):
    (image,) = view.equal.shown
    assert (view.equal.images, view.equal.across) == (1, 1)
    assert image.sources == {"a.jsonl": 3, "b.jsonl": 4}  # in one of a's under another name; the blue one is in one
    assert image.origins == ("a.jsonl, line 1", "a.jsonl, line 4", "a.jsonl, line 5")
    pixel = Image.open(io.BytesIO(base64.b64decode(image.uri.partition(",")[2]))).getpixel((60, 30))
    assert pixel[0] > 240
    assert max(pixel[1:]) < 15
    _, processor, config = data
    twice = dataclasses.replace(config, train=(f"{config.train[0]}#16",))  # each example is drawn twice
    found = run_view("data", twice, processor, seed=0, samples=0)
    assert (found.rows[0].examples, found.equal.shown[0].sources) == (16, {"a.jsonl#16": 3})


def test_what_is_worth_a_look_is_said_with_the_examples(tmp_path, data):
    _, processor, config = data
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    Image.new("RGB", (100, 50), "red").save(tmp_path / "b.png")
    lines = [_chat(f"is it {n}?", "yes" if n % 3 else f"no, {n}") for n in range(30)]
    lines += [
        _chat("<image>color?", "black", images=["a.png"]),
        _chat("<image>color?", "red", images=["b.png"]),  # of another image
        _chat("<image>color?", "white", images=["a.png"]),
        _chat("<image>color?", "red", images=["b.png"]),
        _chat("say <|im_end|>", "so"),
        _chat("where?<image>", "<bbox>", images=["a.png"], objects={"bbox": [[5, 5, 5, 9]]}),
        _chat("there?<image>", "<bbox>", images=["a.png"], objects={"bbox": [[0, 0, 96, 50]]}),
        _chat("here?<image>", "<bbox><bbox>", images=["a.png"], objects={"bbox": [[0, 0, 7, 7], [0, 0, 50, 20]]}),
    ]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(config, train=(str(tmp_path / "e.jsonl"),), seq_len="auto", max_patches="auto")
    shown = run_view("data", config, processor, seed=0, samples=0)
    prior, *others = shown.remarks
    assert prior.text.startswith("20 of 38 answers (53 %) are 'yes'")
    assert [(one.text.rpartition(": ")[2], one.examples) for one in others[:3]] == [
        ("1", ("e.jsonl, line 31 and e.jsonl, line 33",)),
        ("1", ("e.jsonl, line 32 and e.jsonl, line 34",)),
        ("1", ("e.jsonl, line 35",)),
    ]
    assert "and another answer" in others[0].text
    assert "with the same images and answer" in others[1].text
    assert "'<|im_end|>'" in others[2].text
    expected = "of 4 boxes 1 without area, 1 of less than 1 % of their image, 1 of more than 90 % of it"
    assert (others[3].text, len(others)) == (expected, 4)
    assert "Worth a look" in page.render([shown]).decode()


def test_the_page_parses_loads_nothing_and_runs_nothing(text):
    parsed = _Page(text)
    assert not {"script", "iframe", "object", "link", "form"} & set(parsed.tags)
    assert parsed.tags.count("image") >= len(GOOD) - 1
    for value in parsed.loaded:
        assert value.startswith("data:image/jpeg;base64,") or ("http" not in value and "url(" not in value)
    assert not any(name in text.partition("</style>")[0] for name in ("url(", "@import", "http:", "https:"))
    assert any(HOSTILE in words for kind, words in parsed.spans if kind == "text loss")


def test_a_page_too_large_shows_fewer_samples_and_says_so(view, text):
    smaller = page.render([view], largest=len(text.encode()) - 1).decode()
    assert len(smaller) < len(text)
    assert "4 of up to 8 samples of each source are shown" in smaller
    with pytest.raises(UserError, match="without any samples, more than 100"):
        page.render([view], largest=100)


def test_samples_are_drawn_from_the_seed(data):
    _, processor, config = data
    config = dataclasses.replace(config, train=config.train[1:])

    def drawn(seed: int) -> list[str]:
        samples = run_view("data", config, processor, seed=seed, samples=2).samples["b.jsonl"]
        return [one.title for one in samples if one.why.startswith("drawn")]

    assert drawn(0) == drawn(0)
    assert len({*map(tuple, map(drawn, range(4)))}) > 1


def test_a_mixture_shows_the_share_of_each_source(data):
    _, processor, config = data
    files = config.train
    mixture = Mixture(members={"a": Source(files[:1], weight=3), "more": Mixture(members={"b": Source(files[1:])})})
    config = dataclasses.replace(config, train=(), mixture=mixture)
    view = run_view("data", config, processor, seed=0, samples=0)
    assert [(row.name, row.share) for row in view.rows] == [("a", 0.75), ("more/b", 0.25)]
    for row, name in zip(view.rows, ("a", "b"), strict=True):
        expected = _brute_force(data, name)
        assert {key: getattr(row, key) for key in expected} == pytest.approx(expected)


def test_the_command_writes_the_page_and_nothing_over_data(data, tmp_path, capsys):
    folder, _, config = data
    sizes = ["--config", "mimo_vl/easy_vqa", "--data.seq_len", "192", "--data.max_patches", "192", "--evaluation.data"]
    output = tmp_path / "new" / "report.html"
    for _ in range(2):  # its own page may be written again
        assert cli.main(["data", "view", config.train[1], *sizes, "--output", str(output)]) == 0
    assert "8 of 9 examples can be used" in capsys.readouterr().out
    _Page(output.read_text())
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    before = (folder / "b.jsonl").read_bytes()
    assert cli.main(["data", "view", config.train[1], *sizes, "--output", config.train[1]]) == 2
    assert "holds something else than a page" in capsys.readouterr().err
    assert (folder / "b.jsonl").read_bytes() == before
    assert cli.main(["data", "view", config.train[1]]) == 2
    assert "--model DIR or --config" in capsys.readouterr().err


def test_examples_of_a_sequence_have_the_colour_of_their_source(view, data):
    """Of files without a mixture too, as the table above has them."""
    _, _, config = data
    segments = [segment for bar in view.drawn.sequences for segment in bar]
    colours = {segment.label.partition(", ")[0]: segment.colour for segment in segments}
    assert colours == dict(zip(config.train, COLOURS, strict=False))
    assert [row.name for row in view.rows] == ["a.jsonl", "b.jsonl"]


def test_the_beginning_of_a_run_is_what_training_draws_and_packs(data):
    folder, processor, config = data
    members = {"a": Source((str(folder / "a.jsonl"),), weight=0.75), "b": Source((str(folder / "b.jsonl"),))}
    config = dataclasses.replace(config, train=(), mixture=Mixture(members=members), pack_window=16, batch_size=1)
    shown = run_view("data", config, processor, seed=3, samples=0).drawn
    batches, _ = pipeline.training_data(processor, config, seed=3)
    trained = [next(iterator).origins[0] for iterator in [iter(batches)] for _ in range(shown.count)]
    labels = [[segment.label for segment in bar] for bar in shown.sequences]
    expected = [[f"{origin.source}, {origin}: " for origin in origins] for origins in trained]
    assert [[label.partition(": ")[0] + ": " for label in bar] for bar in labels] == expected
    assert sum(source.draws for source in shown.sources) == shown.draws
    assert [source.share for source in shown.sources] == pytest.approx([3 / 7, 4 / 7], abs=1 / shown.draws)
    assert 0 < shown.tokens <= 1
    assert all(0 < bar[-1].x + bar[-1].width <= WIDTH for bar in shown.sequences)


@pytest.mark.parametrize("drawn", [0.0, 0.5])
def test_the_page_does_not_depend_on_whether_examples_are_kept_and_most_are_read_once(data, monkeypatch, drawn):
    _, processor, config = data
    config = dataclasses.replace(config, train=config.train[:1], single_turn_ratio=drawn, pack_window=100)
    read, pages, counts, numbers = encode.Encode._read, {}, {}, []

    def counted(self, element, rng):
        numbers.append(element[0].number)
        return read(self, element, rng)

    monkeypatch.setattr(encode.Encode, "_read", counted)
    for kept in (encode._KNOWN_BYTES, 0):
        monkeypatch.setattr(encode, "_KNOWN_BYTES", kept)
        pages[kept] = page.render([run_view("data", config, processor, seed=0, samples=3)])
        counts[kept] = numbers.count(1)
        numbers.clear()
    once, each_time = counts.values()
    assert len(set(pages.values())) == 1
    # two threads may read the same at once; what a run draws of an example is another one each time
    assert once <= 4 if not drawn else once > 12
    assert each_time > 12


def test_a_mixture_with_a_schedule_is_shown_for_a_run_of_one_pass(data, capsys):
    folder, processor, config = data
    members = {
        "a": Source((str(folder / "a.jsonl"),)),
        "b": Source((str(folder / "b.jsonl"),), weight=0.5, max_epochs=1),
    }
    mixture = Mixture(members=members, schedule=(Phase(0.5, {"b": 2.0}),))
    config = dataclasses.replace(config, train=(), mixture=mixture)
    shown = run_view("data", config, processor, seed=3, samples=0)
    assert shown.drawn.assumed == shown.drawn.draws
    assert shown.drawn.sources[1].passes <= 1
    assert f"A run of {shown.drawn.assumed:,} examples, one pass, is assumed" in page.render([shown]).decode()
    known = run_view("data", dataclasses.replace(config, run_examples=40), processor, seed=3, samples=0)
    assert known.drawn.assumed is None


def test_images_that_look_alike_are_shown_in_pairs(tmp_path, data):
    _, processor, config = data
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((480, 360)) for _ in range(3)]
    scenes[0].save(tmp_path / "0.png")
    scenes[0].resize((400, 300)).save(tmp_path / "1.jpg", quality=90)
    scenes[1].save(tmp_path / "2.png")
    scenes[2].save(tmp_path / "3.png")
    scenes[1].save(tmp_path / "4.png")  # the same bytes: equal, not alike
    names = ("0.png", "1.jpg", "2.png", "3.png", "4.png")
    lines = [json.dumps(_chat("<image>what?", "cells", images=[name])) + "\n" for name in names]
    (tmp_path / "e.jsonl").write_text("".join(lines))
    config = dataclasses.replace(config, train=(str(tmp_path / "e.jsonl"),), seq_len="auto", max_patches="auto")
    shown = run_view("data", config, processor, seed=0, samples=0)
    assert [pair.origins for pair in shown.near.shown] == [("e.jsonl, line 1", "e.jsonl, line 2")]
    assert (shown.near.images, shown.equal.images) == (5, 1)
    assert "Images that look alike" in page.render([shown]).decode()
