"""Training on a mixture: what is drawn, restarts with other numbers of processes, counts of each source."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from jvlm.data import lengths, pipeline, survey
from jvlm.data.document_config import DocumentConfig
from jvlm.data.few_shot_config import FewShot
from jvlm.data.mixture.config import Mixture, Phase, Source
from jvlm.data.mixture.examples import Examples, config_of
from jvlm.data.mixture.table import table
from jvlm.data.position import Share
from jvlm.errors import UserError
from jvlm.training import starting_model
from jvlm.training.data_counters import DataCounters
from jvlm.training.data_record import DataRecord, record_of
from tests.training import support

SIZES = {"general": 50, "math": 23, "text": 7}


def _conversation(words):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    experiment = support.experiment(folder, support.write_examples(folder))
    for name, count in SIZES.items():
        lines = [json.dumps(_conversation(f"{name} {i} " + "circle " * (i % 5))) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = {name: (str(folder / f"{name}.jsonl"),) for name in SIZES}
    single = Mixture(weight=0.9, members={n: Source(files[n], w) for n, w in (("general", 1.0), ("math", 2.0))})
    mixture = Mixture(
        members={"single": single, "text": Source(files["text"], 0.1)},
        schedule=(Phase(0.5, {"text": 0.9}), Phase(0.6, {"single": 0.1}, end=0.8)),
    )
    shape = {"batch_size": 6, "seq_len": 192, "max_patches": 0, "pack_window": 16}
    data = dataclasses.replace(experiment.data, train=(), mixture=mixture, run_examples=600, **shape)
    return dataclasses.replace(experiment, data=data), starting_model.start_model(experiment)[1]


def _iterator(setup, *, share=Share(), **changes):
    experiment, processor = setup
    data = dataclasses.replace(experiment.data, **changes)
    return iter(pipeline.training_data(processor, data, seed=3, share=share)[0])


def _names(packed):
    """Each sequence as the examples in it, in order."""
    return [tuple((origin.source, origin.number) for origin in sequence) for sequence in packed.origins]


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_examples_come_in_the_order_of_the_plan_each_pass_over_a_source_with_all_of_it(setup):
    draws = pipeline.training_data(setup[1], setup[0].data, seed=3)[1]
    drawn = [draws[k].origin for k in range(600)]
    counts = Counter(origin.source for origin in drawn)
    assert counts == dict(zip(draws.plan.names, draws.plan.drawn(600).tolist(), strict=True))
    shares = [
        Counter(origin.source for origin in drawn[a:b])["text"] / (b - a) for a, b in ((0, 300), (300, 360), (480, 600))
    ]
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.9], atol=1 / 60)
    for source, size in (("single/general", 50), ("single/math", 23), ("text", 7)):
        numbers = [origin.number for origin in drawn if origin.source == source]
        for start in range(0, len(numbers) - size + 1, size):
            assert sorted(numbers[start : start + size]) == list(range(1, size + 1))
        assert numbers[:size] != numbers[size : 2 * size]


def test_a_restart_goes_on_as_if_there_had_been_none_across_the_phases_of_a_schedule(setup):
    whole = _iterator(setup)
    first = [next(whole) for _ in range(9)]
    state = json.loads(json.dumps(whole.get_state()))
    rest = [next(whole) for _ in range(9)]
    again = _iterator(setup)
    again.set_state(state)
    for one in rest:
        other = next(again)
        assert _same(one.batch, other.batch)
        assert one.origins == other.origins
        assert one.by_source == other.by_source
    assert sum(sum(one.by_source.values()) for one in first) == sum(one.conversations for one in first)


@pytest.mark.slow
def test_other_numbers_of_processes_pack_the_same_sequences_each_once(setup):
    expected: Counter = Counter()
    alone = _iterator(setup, batch_size=1)
    for _ in range(120):
        expected.update(_names(next(alone)))
    states, seen = None, Counter()
    for count, steps in ((1, 3), (3, 4), (2, 3), (1, 2)):
        parts = [_iterator(setup, share=Share(index, count)) for index in range(count)]
        for part in parts:
            if states is not None:
                part.set_state(states)
        for _ in range(steps):
            for part in parts:
                seen.update(_names(next(part)))
        states = [state for part in parts for state in part.get_state()]
    assert sum(seen.values()) == 6 * 12
    assert not seen - expected  # none that one process would not have packed, none twice


@pytest.mark.slow
def test_worker_processes_change_nothing(setup):
    here, there = _iterator(setup), _iterator(setup, worker_processes=1)
    for _ in range(4):
        assert _same(next(here).batch, next(there).batch)
    there.close()


def test_what_is_drawn_for_an_example_does_not_depend_on_other_sources(setup):
    experiment, processor = setup
    mixture = experiment.data.mixture
    alone = dataclasses.replace(mixture, members={"text": mixture.members["text"]}, schedule=())
    both = dataclasses.replace(mixture, schedule=())
    found = []
    for tree in (alone, both):
        draws = pipeline.training_data(processor, dataclasses.replace(experiment.data, mixture=tree), seed=3)[1]
        own = (one for one in map(draws.__getitem__, range(400)) if one.origin.source == "text")
        found.append([(one.origin, one.seed) for one in itertools.islice(own, 30)])
    assert found[0][: len(found[1])] == found[1]
    assert len(found[1]) == 30


def test_sequences_of_the_unit_sequences_hold_one_source_each(setup):
    experiment, processor = setup
    tree = dataclasses.replace(experiment.data.mixture, unit="sequences", schedule=())
    data = dataclasses.replace(experiment.data, mixture=tree, pack_window=64, batch_size=1)
    data = survey.take(processor, data, seed=0, count=60).config
    assert len(data.measured) == 3
    stream, counts = iter(pipeline.training_data(processor, data, seed=3)[0]), Counter()
    for _ in range(200):
        (sequence,) = next(stream).origins
        (source,) = {origin.source for origin in sequence}
        counts[source] += 1
    asked = {"single/general": 0.3, "single/math": 0.6, "text": 0.1}
    assert all(abs(counts[name] / 200 - share) < 0.06 for name, share in asked.items()), counts


def test_counts_of_the_sources_sum_to_the_totals_whoever_goes_on(setup, tmp_path):
    experiment, processor = setup
    stream, draws = pipeline.training_data(processor, experiment.data, seed=3)
    make = lambda folder: DataCounters(  # noqa: E731
        folder, draws.plan.examples_per_pass, experiment.data, counts=True, sources=draws.examples.sizes()
    )
    counters, again = make(tmp_path), make(tmp_path)
    for number, packed in zip(range(8), iter(stream), strict=False):
        counters.add(packed, number)
    totals = counters.totals()
    read = {name: read for name, (read, _) in totals.by_source.items()}
    assert sum(read.values()) == totals.read == totals.conversations
    values = counters.log_values(None)
    assert values["epoch/text"] == round(read["text"] / 7, 4)
    assert values["rejected/text"] == 0
    again.restore(json.loads(json.dumps(counters.state())), 8)
    assert again.totals() == totals


def test_a_checkpoint_of_other_data_is_refused_with_both_values_unless_that_is_accepted(setup):
    experiment, processor = setup
    draws = pipeline.training_data(processor, experiment.data, seed=3)[1]
    saved = json.loads(json.dumps(record_of(draws, experiment)))
    DataRecord(draws, experiment).restore(saved, 5)
    saved["sources"]["text"] |= {"examples": 8, "files": {"text.jsonl": 1}}
    with pytest.raises(UserError, match=r"sources.text.examples: 8 -> 7(.|\n)*text.files.text.jsonl: 1 -> \d+"):
        DataRecord(draws, experiment).restore(saved, 5)
    accepted = DataRecord(draws, dataclasses.replace(experiment, accept_changes=True))
    accepted.restore(saved, 5)

    class Trainer:
        step = 5
        shard = Share(0, 1)

        def restore_data(self, position):
            self.position = position

    trainer = Trainer()
    accepted.on_train_start(trainer)
    stream = _iterator(setup)
    first = next(stream)
    next(stream)
    stream.set_state(trainer.position)
    assert _same(next(stream).batch, first.batch)


def test_a_source_without_files_is_named(setup):
    data = setup[0].data
    mixture = Mixture(members={"text": data.mixture.members["text"], "b": Mixture(members={"c": Source()})})
    with pytest.raises(UserError, match=r"data.mixture, source 'b/c': no files; give some, or weight 0"):
        Examples.open(dataclasses.replace(data, mixture=mixture))


def test_lengths_are_kept_until_the_data_or_what_has_a_loss_changes(setup, tmp_path):
    experiment, processor = setup
    data = dataclasses.replace(experiment.data, lengths_folder=str(tmp_path / "lengths"))
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps(_conversation("circle " * n)) + "\n" for n in (1, 2, 3)) + "not json\n")
    own = config_of(data, Source((str(file),)))
    source = Examples.open(own).parts[0]
    found = lengths.of_source(processor, own, "few", source, sample=None)
    encoded = [processor.encode(_conversation("circle " * n)) for n in (1, 2, 3)]
    assert found.tokens.tolist() == [*(one.length for one in encoded), 0]
    assert found.loss_tokens.tolist() == [*(int((one.loss_weights > 0).sum()) for one in encoded), 0]
    assert found.status.tolist() == [lengths.GOOD] * 3 + [lengths.BAD]
    assert found.mean("tokens", own) == sum(one.length for one in encoded) / 4
    path = lengths.path_of(processor, own, "few")
    again = lengths.load(path, source.files)
    assert all(
        np.array_equal(x, y) for x, y in zip(dataclasses.astuple(again), dataclasses.astuple(found), strict=True)
    )
    assert lengths.path_of(processor, dataclasses.replace(own, loss="all"), "few") != path
    file.write_text(json.dumps(_conversation("circle")) + "\n")
    assert lengths.load(path, source.files) is None


def test_the_table_tells_what_a_run_draws_from_each_source(setup):
    experiment, processor = setup
    mixture = experiment.data.mixture
    tree = dataclasses.replace(
        mixture, members={**mixture.members, "text": dataclasses.replace(mixture.members["text"], max_epochs=5.0)}
    )
    data = dataclasses.replace(experiment.data, mixture=dataclasses.replace(tree, schedule=()))
    draws = pipeline.training_data(processor, data, seed=3)[1]
    lines = table(draws, data).splitlines()
    counts = draws.plan.drawn(600).tolist()
    for line, size, count in zip(lines[1:4], (50, 23, 7), counts, strict=True):
        _, examples, share, _, epochs, repeated = line.split()
        assert (int(examples), int(repeated)) == (size, count - size)
        assert (float(share), float(epochs)) == (round(count / 6, 2), round(count / size, 2))
    assert counts[2] <= 35
    assert "warning: single/math is gone through" in table(draws, data)
    assert "text gives 34 examples and not 60: max_epochs is 5" in table(draws, data)


def test_a_source_has_a_media_root_documents_and_demonstrations_of_its_own(setup, tmp_path):
    experiment, processor = setup
    (tmp_path / "media").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "media" / "a.png")
    pages, asked = tmp_path / "pages.jsonl", tmp_path / "asked.jsonl"
    pages.write_text('{"text": "<image>a page", "images": ["a.png"]}\n' * 4)
    asked.write_text("".join(json.dumps(_conversation(f"asked {i}")) + "\n" for i in range(4)))
    members = {
        "pages": Source((str(pages),), media_root=str(tmp_path / "media"), documents=DocumentConfig(join=2)),
        "asked": Source((str(asked),), few_shot=FewShot((1, 1), "source")),
    }
    data = dataclasses.replace(
        experiment.data, mixture=Mixture(members=members), run_examples=None, max_patches=256, batch_size=1
    )
    packed = list(pipeline.training_data(processor, data, seed=3, epochs=1)[0])
    segments = Counter(origin.source for one in packed for sequence in one.origins for origin in sequence)
    assert segments == {"pages": 2, "asked": 4}
    assert sum(one.conversations for one in packed) == 8
    text = "".join(processor.tokenizer.decode(tokens) for one in packed for tokens in one.batch.tokens)
    assert text.count("<|im_start|>user") == 8  # each question behind another one
    bare = {**members, "pages": dataclasses.replace(members["pages"], media_root=None)}
    lacking = dataclasses.replace(data, mixture=Mixture(members=bare))
    with pytest.raises(UserError, match=r"a\.png"):
        list(pipeline.training_data(processor, lacking, seed=3, epochs=1)[0])
