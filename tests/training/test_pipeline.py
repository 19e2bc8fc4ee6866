"""The data pipeline: nothing lost, same order again, state restored."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from jvlm.data import pipeline
from jvlm.data.check import check
from jvlm.data.conversion import convert
from jvlm.data.errors import Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.position import Share
from jvlm.errors import UserError
from jvlm.training import starting_model
from tests.training import support


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    examples = support.write_examples(folder)
    experiment = support.experiment(folder, examples)
    return experiment, starting_model.start_model(experiment)[1], examples


def _batches(setup, **changes):
    experiment, processor, _ = setup
    config = dataclasses.replace(experiment.data, **changes)
    return list(pipeline.training_data(processor, config, seed=3, epochs=1)[0])


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _conversations(batches):
    """Every packed conversation as (tokens, number of patch values, their sum), whatever its place."""
    found = []
    for packed in batches:
        batch = packed.batch
        for b in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[b].max() + 1):
                inside = batch.segment_ids[b] == segment
                features = batch.vision_index[b][inside]
                group = 4
                patches = [batch.patches[b, group * f : group * f + group] for f in features[features >= 0]]
                found.append((tuple(batch.tokens[b][inside]), len(patches), int(np.sum(patches, dtype=np.int64))))
    return sorted(found)


def test_an_epoch_holds_every_conversation_once(setup):
    _, processor, examples = setup
    expected = []
    for line in examples.read_text().splitlines():
        example = processor.encode(parse_example(json.loads(line), Origin(str(examples), 1)))
        count = int((example.vision_index >= 0).sum())
        expected.append((tuple(example.tokens), count, int(example.patches.sum(dtype=np.int64))))
    assert _conversations(_batches(setup)) == sorted(expected)


def test_the_same_seed_gives_the_same_batches_and_shuffling_changes_the_order(setup):
    first, again, ordered = _batches(setup), _batches(setup), _batches(setup, shuffle="none")
    assert all(_same(a.batch, b.batch) for a, b in zip(first, again, strict=True))
    assert not _same(first[0].batch, ordered[0].batch)
    assert _conversations(first) == _conversations(ordered)


@pytest.mark.parametrize("epochs", [2, 5])
def test_the_first_epoch_does_not_depend_on_how_many_follow(setup, epochs):
    experiment, processor, _ = setup
    longer = pipeline.training_data(processor, experiment.data, seed=3, epochs=epochs)[0]
    first = _batches(setup)[:-1]  # the last one is filled from the next epoch
    assert first
    assert all(_same(a.batch, b.batch) for a, b in zip(longer, first, strict=False))


def test_batches_of_a_window_come_in_no_order_of_length(setup, tmp_path):
    _, processor, _ = setup
    words = [" circle" * (n + 1) for n in range(32)]
    messages = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in words]
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    longest = processor.encode(parse_example({"messages": messages[-1]}, Origin("", 1))).length
    changes = {"train": (str(examples),), "batch_size": 2, "seq_len": longest, "max_patches": 0, "pack_window": 32}

    def lengths(**more):
        batches = _batches(setup, **changes, **more)
        return [int((b.batch.segment_ids == 1).sum(1).max()) for b in batches]

    assert lengths(shuffle="none") == sorted(lengths(shuffle="none"), reverse=True)
    assert len(lengths()) >= 8
    assert lengths() not in (sorted(lengths()), sorted(lengths(), reverse=True))


def test_alone_learns_single_turns_drawn_by_weight_and_keeps_the_pictures(setup, tmp_path):
    experiment, processor, examples = setup
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    for line in lines:
        line["images"] = [str(examples.parent / name) for name in line["images"]]
        line["messages"][1]["loss_scale"] = 0
    weighted = tmp_path / "examples.jsonl"
    weighted.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(experiment.data, single_turn_ratio=1.0, train=(str(weighted),))
    batches = list(pipeline.training_data(processor, config, seed=3, epochs=1)[0])
    assert sum(b.conversations for b in batches) == len(lines)
    texts = [processor.tokenizer.decode(tokens) for tokens, _, _ in _conversations(batches)]
    assert all(text.count("<|im_start|>assistant") == 1 for text in texts)
    assert not any("what color" in text for text in texts)
    features = sum(count for _, count, _ in _conversations(batches))
    assert features == sum(count for _, count, _ in _conversations(_batches(setup)))


# each start of an iterator with processes of its own takes seconds
@pytest.mark.parametrize(("processes", "starts"), [(0, (0, 1, 4, 8)), (1, (4,))])
def test_an_iterator_restored_anywhere_continues_as_if_never_stopped(setup, processes, starts):
    experiment, processor, _ = setup
    config = dataclasses.replace(experiment.data, worker_processes=processes)

    def fresh():
        return iter(pipeline.training_data(processor, config, seed=5)[0])

    iterator = fresh()
    states, batches = [json.dumps(iterator.get_state())], []
    for _ in range(9):
        batches.append(next(iterator).batch)
        states.append(json.dumps(iterator.get_state()))
    iterator.close()
    for start in starts:
        restored = fresh()
        restored.set_state(json.loads(states[start]))
        for expected in batches[start : start + 3]:
            assert _same(next(restored).batch, expected)
        restored.close()


def test_every_batch_has_the_same_shapes_even_the_last(setup):
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(p.batch)) for p in _batches(setup, batch_size=5)}
    assert len(shapes) == 1


def test_shards_give_the_same_batches_as_the_jsonl_they_were_made_from(setup, tmp_path):
    _, _, examples = setup
    convert([str(examples)], tmp_path / "shards", examples_per_shard=10)
    assert len(list((tmp_path / "shards").iterdir())) == 3
    from_shards = _batches(setup, train=(str(tmp_path / "shards" / "*.arrayrecord"),))
    assert all(_same(a.batch, b.batch) for a, b in zip(from_shards, _batches(setup), strict=True))


def test_check_counts_good_examples_and_names_each_bad_one(setup, tmp_path):
    _, processor, examples = setup
    good = examples.read_text().splitlines()[0]
    path = tmp_path / "mixed.jsonl"
    lacking = {"messages": [{"role": "user", "content": "<image>"}], "images": ["gone.png"]}
    path.write_text(f"{good}\n{json.dumps(lacking)}\n[1]\n")
    report = check([str(path)], processor)
    assert (report.examples, len(report.rejected), len(report.tokens)) == (3, 2, 1)
    assert "gone.png" in report.text()
    assert f"{path}, line 3" in report.text()


def test_a_pattern_without_files_and_an_unknown_kind_of_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\*.jsonl"):
        ExampleSource([str(tmp_path / "nothing*.jsonl")])
    (tmp_path / "examples.txt").write_text("a,b\n")
    with pytest.raises(UserError, match=r"examples.txt: examples are read from"):
        ExampleSource([str(tmp_path / "examples.txt")])


def _examples_of(packed):
    return [(o.file, o.number) for sequence in packed.origins for o in sequence]


@pytest.mark.parametrize("window", [1, 4, 6, 100])
@pytest.mark.parametrize("steps", [(1, 1), (2, 3), (3, 0)])
def test_each_example_comes_once_an_epoch_while_processes_come_and_go(setup, window, steps):
    """Two processes, then three, then one, each restored from the states of those before."""
    experiment, processor, examples = setup
    config = dataclasses.replace(experiment.data, batch_size=6, pack_window=window, seq_len=96, max_patches=96)
    seen, states = [], None
    for count, steps_here in ((2, steps[0]), (3, steps[1]), (1, None)):
        found = []
        for index in range(count):
            dataset, _ = pipeline.training_data(processor, config, seed=3, epochs=1, share=Share(index, count))
            iterator = iter(dataset)
            if states is not None:
                iterator.set_state(json.loads(json.dumps(states)))
            for packed in itertools.islice(iterator, steps_here):
                assert len(packed.batch.tokens) == 6 // count
                seen += _examples_of(packed)
            found += iterator.get_state()
            iterator.close()
        states = found[::-1]
    assert sorted(seen) == [(str(examples), number + 1) for number in range(len(examples.read_text().splitlines()))]


def test_processes_restored_in_the_same_number_go_on_with_the_same_batches(setup):
    experiment, processor, _ = setup
    config = dataclasses.replace(experiment.data, batch_size=6, pack_window=4)

    def start(states=None):
        found = [iter(pipeline.training_data(processor, config, seed=9, share=Share(i, 3))[0]) for i in range(3)]
        for iterator in found if states else ():
            iterator.set_state(states)
        return found

    unbroken = start()
    for _ in range(3):
        states = [state for iterator in unbroken for state in (next(iterator), iterator.get_state()[0])[1:]]
    again = start(states)
    for _ in range(4):
        assert all(_same(next(a).batch, next(b).batch) for a, b in zip(unbroken, again, strict=True))
    for iterator in unbroken + again:
        iterator.close()


def test_examples_that_processes_cannot_share_evenly_are_refused(setup):
    experiment, processor, _ = setup
    with pytest.raises(UserError, match=r"data.batch_size = 2 cannot be shared evenly by 3 processes"):
        pipeline.training_data(processor, experiment.data, seed=0, share=Share(0, 3))


def _rejected(batches):
    return sorted((one.number, one.kind) for packed in batches for one in packed.rejected)


def test_the_share_that_is_left_out_is_right_from_the_first_batch_on(setup, tmp_path):
    """A run ends where it is more than its limits: a window's rejected examples must not all count at once."""
    experiment, processor, _ = setup
    lines = [{"messages": [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": "red"}]}] * 90
    lines[::10] = [{"messages": []}] * 9
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"train": (str(path),), "on_bad_example": "skip", "pack_window": 90, "batch_size": 1, "max_patches": 0}
    config = dataclasses.replace(experiment.data, **changes)
    used = left_out = 0
    batches, _ = pipeline.training_data(processor, config, seed=0, epochs=1)
    iterator = iter(batches)
    for number, packed in enumerate(iterator):
        if number == 3:
            states = iterator.get_state()
        used, left_out = used + packed.conversations, left_out + len(packed.rejected)
        assert abs(left_out - 0.1 * (used + left_out)) < 2
        if number == 4:
            fifth = packed.rejected
    assert (used, left_out) == (81, 9)
    again = iter(batches)
    again.set_state(states)
    assert next(again).rejected == fifth
    again.close()


@pytest.fixture(scope="module")
def with_damage(setup, tmp_path_factory):
    """The examples, but an image of number 3 cannot be decoded, and the file of one of number 9 is cut off."""
    _, _, examples = setup
    folder = tmp_path_factory.mktemp("damage")
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    for number, line in enumerate(lines, 1):
        line["images"] = [str(examples.parent / name) for name in line["images"]]
        if number in (3, 9):
            content = (examples.parent / line["images"][0]).read_bytes()
            at = content.index(b"IDAT") + 8
            spoilt = content[:at] + bytes(8) + content[at + 8 :] if number == 3 else content[:at]
            (folder / f"{number}.png").write_bytes(spoilt)
            line["images"][0] = str(folder / f"{number}.png")
    path = folder / "damaged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("window", [4, 100])
def test_an_image_that_cannot_be_decoded_is_left_out_alone_and_counted_once(setup, with_damage, window):
    changes = {"train": (str(with_damage),), "on_bad_example": "skip", "pack_window": window}
    batches = _batches(setup, **changes)
    assert _rejected(batches) == [(3, "bad"), (9, "bad")]
    assert sum(packed.conversations for packed in batches) == 22
    lines = with_damage.read_text().splitlines()
    good = with_damage.with_name("good.jsonl")
    good.write_text("".join(line + "\n" for number, line in enumerate(lines, 1) if number not in (3, 9)))
    assert _conversations(batches) == _conversations(_batches(setup, train=(str(good),)))
    with pytest.raises(
        UserError, match=r"damaged.jsonl, line (3|9), field 'images\[0\]': the image .* cannot be decoded"
    ):
        _batches(setup, **changes | {"on_bad_example": "error"})


def test_data_of_which_no_image_can_be_decoded_ends(setup, with_damage, tmp_path):
    experiment, processor, _ = setup
    lines = [json.loads(line) for line in with_damage.read_text().splitlines()]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(lines[number]) + "\n" for number in (2, 8)))
    config = dataclasses.replace(experiment.data, train=(str(path),), on_bad_example="skip")
    iterator = iter(pipeline.training_data(processor, config, seed=3)[0])
    with pytest.raises(UserError, match="none of the 2 examples can be used"):
        assert sum(next(iterator).conversations for _ in range(20)) == 0
    iterator.close()


@pytest.mark.slow
def test_batches_and_rejected_examples_do_not_depend_on_who_reads(setup, with_damage):
    changes = {"train": (str(with_damage),), "on_bad_example": "skip"}
    threads = _batches(setup, **changes)
    for processes in (1, 2, 3):
        found = _batches(setup, **changes, worker_processes=processes)
        assert all(_same(a.batch, b.batch) for a, b in zip(found, threads, strict=True))
        assert [p.rejected for p in found] == [p.rejected for p in threads]


def test_media_outside_the_folders_that_are_allowed_are_refused_links_and_dots_included(setup, tmp_path):
    _, _, examples = setup
    data = tmp_path / "data"
    data.mkdir()
    (data / "inside.png").write_bytes((examples.parent / "1_0.png").read_bytes())
    (tmp_path / "outside.png").write_bytes((examples.parent / "1_0.png").read_bytes())
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    names = [
        "inside.png",
        "../outside.png",
        "link.png",
        str(tmp_path / "outside.png"),
        f"file://{tmp_path}/outside.png",
    ]
    turns = [{"role": "user", "content": "<image>what color?"}, {"role": "assistant", "content": "red"}]
    path = data / "examples.jsonl"
    path.write_text("".join(json.dumps({"messages": turns, "images": [name]}) + "\n" for name in names))
    changes = {"train": (str(path),), "on_bad_example": "skip"}
    assert _rejected(_batches(setup, **changes)) == []
    for folders in ((str(data),), (str(data / ".." / "data"), str(tmp_path / "other"))):
        assert _rejected(_batches(setup, **changes, media_folders=folders)) == [(n, "bad") for n in (2, 3, 4, 5)]
