"""The look at the data before a run: what would be left out and why, and sizes of a sequence that suit the data."""

from __future__ import annotations

import dataclasses
import json
import threading

import numpy as np
import pytest
from PIL import Image

from jvlm.data import packing, pipeline, survey
from jvlm.data.errors import ExampleError, Rejected, grouped
from jvlm.data.position import Share
from jvlm.data.survey import Size
from jvlm.errors import UserError
from jvlm.training import starting_model
from tests.training import support


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    experiment = support.experiment(folder, support.write_examples(folder))
    return experiment.data, starting_model.start_model(experiment)[1]


def _text(words: int) -> dict:
    messages = [{"role": "user", "content": "is there a red shape? " * words}, {"role": "assistant", "content": "no"}]
    return {"messages": messages}


def _write(path, examples) -> str:
    path.write_text(
        "".join((example if isinstance(example, str) else json.dumps(example)) + "\n" for example in examples)
    )
    return str(path)


def _look(base, path, **changes):
    data, processor = base
    data = dataclasses.replace(data, train=(path,), **changes)
    return survey.take(processor, data, seed=0, count=512)


def test_what_would_be_left_out_is_said_with_share_reason_places_and_fix(base, tmp_path):
    path = _write(tmp_path / "examples.jsonl", [*[_text(60)] * 20, *[_text(99)] * 16, *[_text(1)] * 4])
    found = _look(base, path, max_too_long_fraction=1.0)
    found.check()
    longest = base[1].encode(_text(99)).length
    text = found.text()
    assert "40 of 40 examples looked at, 36 would be left out (90.0 %)" in text
    assert f"36 x field 'messages': up to {longest} tokens do not fit 192 ({path}, lines 1, 2, 3)" in text
    assert "data.seq_len" in text
    assert "shrink" in text
    with pytest.raises(
        UserError, match=r"36 of 40 examples (.|\n)*data.max_too_long_fraction = 0.25(.|\n)*lines 1, 2, 3"
    ):
        _look(base, path).check()


def test_data_of_which_nothing_can_be_used_is_refused_with_every_reason(base, tmp_path):
    path = _write(tmp_path / "examples.jsonl", [_text(60), _text(99), "not json", _text(60)])
    found = _look(base, path, on_bad_example="skip", max_too_long_fraction=1.0)
    with pytest.raises(
        UserError, match=r"none of 4 examples(.|\n)*3 x field 'messages'(.|\n)*1 x field 'example': not JSON"
    ):
        found.check()


def test_errors_that_stop_a_run_stop_it_before_the_first_step(base, tmp_path):
    path = _write(tmp_path / "examples.jsonl", [_text(1), _text(60), "not json"])
    with pytest.raises(ExampleError, match=r"examples.jsonl, (example|line) 3"):
        _look(base, path)
    with pytest.raises(ExampleError, match=r"do not fit 192"):
        _look(base, path, on_bad_example="skip", on_too_long="error")


def test_pictures_that_will_be_shrunk_are_counted(base, tmp_path):
    Image.new("RGB", (256, 256)).save(tmp_path / "large.png")
    example = _text(1)
    example["messages"][0]["content"] += "<image>"
    large = {**example, "images": ["large.png"], "chat_template_kwargs": {"max_pixels": 256 * 256}}
    path = _write(tmp_path / "examples.jsonl", [large, _text(1), _text(1)])
    found = _look(base, path, on_too_long="shrink")
    assert "0 would be left out, 1 have their images shrunk to fit" in found.text()
    assert max(size.num_patches for size in found.sizes) <= 192
    assert len(_look(base, path, max_too_long_fraction=1.0).left_out) == 1


def test_a_limit_of_time_is_kept_and_what_was_seen_is_said(base, tmp_path):
    path = _write(tmp_path / "examples.jsonl", [_text(1)] * 400)
    data, processor = base
    data = dataclasses.replace(data, train=(path,), read_threads=2)
    found = survey.take(processor, data, seed=0, count=512, seconds=0.0)
    assert 0 < found.sampled < 400
    assert f"{found.sampled} of 400 examples looked at" in found.text()


SIZES = {
    "short text": [Size(n, 0, 0) for n in (40, 55, 70) * 40],
    "one picture each": [Size(170 + n % 9, 64, 64) for n in range(120)],
    "many sizes": [Size(int(n), int(n) * 3 // 4 * 4, int(n)) for n in np.random.default_rng(0).integers(30, 900, 150)],
    "one long among short": [Size(60, 16, 16)] * 90 + [Size(2500, 4096, 4096)],
    "pictures in few": [Size(50, 0, 0)] * 80 + [Size(300, 1024, 1024)] * 20,
}


@pytest.mark.parametrize("asked", [("auto", "auto"), (4096, "auto"), ("auto", 4096)])
@pytest.mark.parametrize("name", SIZES)
def test_chosen_sizes_hold_every_example_and_pad_nearly_as_little_as_any(base, name, asked):
    sizes = SIZES[name]
    data = dataclasses.replace(base[0], seq_len=asked[0], max_patches=asked[1], pack_window=128, batch_size=1)
    chosen = survey.choose_sizes(sizes, data, base[1])
    tokens, patches = chosen.seq_len, chosen.max_patches
    assert tokens >= max(size.length for size in sizes)
    assert patches >= max(size.num_patches for size in sizes)
    assert (asked[0] in ("auto", tokens), asked[1] in ("auto", patches)) == (True, True)
    assert survey.choose_sizes(sizes, data, base[1]) == chosen, "the same data gives the same sizes"

    def waste(tokens: int, patches: int) -> float:
        sequences = [packing.best_fit_decreasing(part, tokens, patches) for part in (sizes[:128], sizes[128:]) if part]
        count = sum(map(len, sequences))
        lost = 1 - sum(s.length for s in sizes) / count / tokens
        return lost + (1 - sum(s.num_patches for s in sizes) / count / patches if patches else 0)

    if asked == ("auto", "auto"):
        assert waste(tokens, patches) <= waste(4096, 8192) + 1e-9
        longest, most = max(s.length for s in sizes), max(s.num_patches for s in sizes)
        tried = [(longest * a // 64 * 64 + 64, most * b // 64 * 64 + 64) for a in range(1, 5) for b in range(1, 5)]
        assert waste(tokens, patches) <= min(waste(*shape) for shape in tried if shape[1] or not most) + 0.15


def test_auto_sizes_of_a_run_are_numbers_and_divide_by_what_shares_them(base, tmp_path):
    data, processor = base
    data = dataclasses.replace(data, seq_len="auto", max_patches="auto")
    found = survey.take(processor, data, seed=0, count=512, parts=3)
    assert found.config.seq_len % 192 == 0
    assert found.config.max_patches % 12 == 0
    assert not found.left_out
    text, patches = found.padding()
    assert f"padding is about {100 * text:.0f} % of the tokens and {100 * patches:.0f} % of the patches" in found.text()
    with pytest.raises(UserError, match="a run chooses from its data"):
        pipeline.training_data(processor, data, seed=0)


@pytest.mark.parametrize("share", [Share(), Share(1, 2)])
@pytest.mark.parametrize("kind", ["too long", "bad"])
def test_reading_without_end_stops_after_an_epoch_that_gives_nothing(base, tmp_path, kind, share):
    data, processor = base
    examples = [_text(60)] * 20 if kind == "too long" else ["not json"] * 20
    data = dataclasses.replace(data, train=(_write(tmp_path / "examples.jsonl", examples),), on_bad_example="skip")
    iterator = iter(pipeline.training_data(processor, data, seed=0, share=share)[0])
    said = []

    def read():
        try:
            next(iterator)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it reads for ever"
    assert "none of the 20 examples can be used" in said[0]
    assert ("do not fit 192" if kind == "too long" else "not JSON") in said[0]


def test_examples_among_many_bad_ones_are_found_however_rare(base, tmp_path):
    data, processor = base
    path = _write(tmp_path / "examples.jsonl", ["not json"] * 39 + [_text(1)])
    data = dataclasses.replace(data, train=(path,), on_bad_example="skip")
    iterator = iter(pipeline.training_data(processor, data, seed=0)[0])
    batches = [next(iterator) for _ in range(3)]
    assert all(packed.conversations for packed in batches)
    iterator.close()


def test_reasons_that_differ_in_numbers_are_one_and_the_worst_is_shown():
    examples = [
        Rejected("a.jsonl", n, "messages", f"{200 + n} tokens do not fit 192", "too_long", "Fix") for n in range(9)
    ]
    examples += [Rejected("b.jsonl", 3, "images[2]", "gone")]
    first, second = grouped(examples).splitlines()
    assert first == "  9 x field 'messages': up to 208 tokens do not fit 192 (a.jsonl, lines 0, 1, 2). Fix"
    assert second.startswith("  1 x field 'images[2]': gone (b.jsonl, line 3)")
    assert "4 x other reasons" in grouped([Rejected("a", n, "f" + "x" * n, "r") for n in range(9)])


def test_unknown_columns_are_listed_once_with_the_name_they_may_have_been_meant_to_have(base, tmp_path):
    examples = [{**_text(1), "source": "web", "imges": None}, {**_text(1), "source": "web", "imagess": []}, _text(1)]
    text = _look(base, _write(tmp_path / "examples.jsonl", examples)).text()
    assert text.count("source") == text.count("imagess") == 1
    assert "column 'source' is not used, in 2 examples" in text
    assert "column 'imagess' is not used, in 1 example. Is it meant to be 'images'?" in text
    assert "imges" not in text
