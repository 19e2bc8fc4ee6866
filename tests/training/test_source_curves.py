"""Loss and accuracy of each data source: sums against all the logits in float64, and the lines of a run."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvlm.data import sources
from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError
from jvlm.data.examples import parse_example
from jvlm.data.packing import PackedSequences
from jvlm.training import runs
from jvlm.training.hooks import StepResult
from jvlm.training.source_curves import SourceCurves
from jvlm.training.supervised import SupervisedTask
from tests import quick
from tests.parallel import models
from tests.training import support

NAMES = ("chart", "photo", "other")


@pytest.fixture(scope="module")
def packed():
    """Sequences of several conversations, of two of three sources and of none."""
    batch = models.batch(models.qwen2_5_vl())
    rng = np.random.default_rng(0)
    numbers = tuple(tuple(rng.choice([-1, 0, 2], ids.max()).tolist()) for ids in batch.segment_ids)
    return PackedSequences(batch, 0, (), (), numbers, NAMES)


def test_sums_of_each_source_are_those_of_its_conversations_and_the_loss_is_as_without_them(packed):
    model, task, batch = quick.random_model(models.qwen2_5_vl()), SupervisedTask(), packed.batch

    @jax.jit
    def both(packed):
        return task.loss(model, packed), model.decoder.logits(model.hidden(packed.packed).hidden)

    loss, logits = both(task.batch_of(packed))
    logits = np.asarray(logits, np.float64)[:, :-1]
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    targets, segments = batch.tokens[:, 1:], batch.segment_ids
    weights = batch.loss_weights[:, 1:] * (segments[:, 1:] == segments[:, :-1])
    losses = -weights * np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    right = (logits.argmax(-1) == targets) & (weights > 0)
    expected = np.zeros((3, 5))
    for row, numbers in enumerate(packed.sources):
        for segment, number in enumerate(numbers, 1):
            if number >= 0:
                at = row, segments[row, :-1] == segment
                sums = losses[at].sum(), weights[at].sum(), right[at].sum(), (weights[at] > 0).sum(), 1
                expected[number] += sums
    np.testing.assert_allclose(loss.sources, expected, rtol=1e-5)
    assert expected[[0, 2]][:, [0, 1, 3, 4]].all()
    assert not expected[1].any()
    np.testing.assert_allclose(loss.total, losses.sum(), rtol=1e-5)


def test_without_names_nothing_is_added_to_the_batch(packed):
    assert SupervisedTask().batch_of(dataclasses.replace(packed, source_names=())) is packed.batch


def step(number, sums, skipped=0.0):
    metrics = {"sources": jnp.asarray(sums, jnp.float32), "skipped": jnp.float32(skipped)}
    return StepResult(number, (), metrics, 0.0)


FIRST = [[6.0, 4.0, 1.0, 4.0, 2.0], [0.0] * 5, [3.0, 2.0, 2.0, 2.0, 1.0]]
SECOND = [[2.0, 4.0, 3.0, 6.0, 1.0], [0.0] * 5, [0.0] * 5]


def test_a_line_has_the_means_since_the_last_and_examples_since_the_beginning():
    hook, trainer = SourceCurves(NAMES), SimpleNamespace()
    for number, result in enumerate((step(1, FIRST), step(2, SECOND), step(3, np.full((3, 5), np.nan), 1.0)), 1):
        assert result.step == number
        hook.on_step_end(trainer, result)
    assert hook.log_values(trainer) == {
        "loss/chart": 1.0,
        "token_acc/chart": 0.4,
        "loss/other": 1.5,
        "token_acc/other": 1.0,
        "examples/chart": 3.0,
        "examples/photo": 0.0,
        "examples/other": 1.0,
        "tokens/chart": 10.0,
        "tokens/photo": 0.0,
        "tokens/other": 2.0,
    }
    hook.on_step_end(trainer, step(4, SECOND))
    later = hook.log_values(trainer)
    assert later == {
        "loss/chart": 0.5,
        "token_acc/chart": 0.5,
        "examples/chart": 4.0,
        "examples/photo": 0.0,
        "examples/other": 1.0,
        "tokens/chart": 16.0,
        "tokens/photo": 0.0,
        "tokens/other": 2.0,
    }


def test_a_run_that_goes_on_between_two_lines_logs_the_same():
    hook, again, trainer = SourceCurves(NAMES), SourceCurves(NAMES), SimpleNamespace()
    hook.on_step_end(trainer, step(1, FIRST))
    hook.log_values(trainer)
    hook.on_step_end(trainer, step(2, FIRST))
    again.restore(json.loads(json.dumps(hook.state())), 2)
    for one in (hook, again):
        one.on_step_end(trainer, step(3, SECOND))
    assert hook.log_values(trainer) == again.log_values(trainer)


def test_files_or_channels_are_numbered(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c-1.jsonl", "c-2.jsonl"):
        (tmp_path / name).write_text("{}\n")
    patterns = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c-*.jsonl"))
    config = DataConfig(train=patterns)
    names = sources.names(config, ())
    assert names == ("a.jsonl", "b.jsonl", "c-*.jsonl")
    numbers = sources.SourceNumbers(dataclasses.replace(config, sources=names))
    origin = sources.ExampleError(
        parse_example({"messages": [{"role": "user", "content": "a"}]}).origin, "", "", ""
    ).origin
    chat = parse_example({"messages": [{"role": "user", "content": "a"}], "channel": "photo"}, origin)

    def of(path):
        return numbers.of(dataclasses.replace(chat, origin=dataclasses.replace(origin, file=str(path))))

    assert [of(tmp_path / name) for name in ("b.jsonl", "c-2.jsonl", "d.jsonl")] == [1, 2, -1]
    assert sources.names(dataclasses.replace(config, train=patterns[:1]), ()) == (), "one source has the curve of all"
    assert sources.names(dataclasses.replace(config, curves="off"), ()) == ()
    channels = dataclasses.replace(config, curves="channel")
    names = sources.names(channels, ["photo", "chart", "photo"])
    assert names == ("chart", "photo", "other")
    numbers = sources.SourceNumbers(dataclasses.replace(channels, sources=names))
    assert numbers.of(chat) == 1
    assert (
        numbers.of(dataclasses.replace(chat, extra=()))
        == numbers.of(dataclasses.replace(chat, extra=(("channel", "x"),)))
        == 2
    )
    assert sources.names(channels, ()) == ()
    with pytest.raises(ExampleError, match=r"field 'channel': 3 is not a name"):
        numbers.of(dataclasses.replace(chat, extra=(("channel", 3),)))


@pytest.mark.slow
@pytest.mark.parametrize("curves", ["dataset", "channel"])
def test_a_run_has_a_curve_of_each_file_or_channel_in_log_and_tensorboard(tmp_path, curves):
    one, two = (support.write_examples(tmp_path / name, 8) for name in ("one", "two"))
    for path, channels in ((one, ("a", "b")), (two, ("b", "b"))):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for number, record in enumerate(records):
            record["channel"] = channels[number % 2]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    second = two.rename(two.parent / "second.jsonl")
    experiment = support.experiment(
        tmp_path,
        one,
        "--data.train",
        str(one),
        str(second),
        "--data.curves",
        curves,
        "--steps",
        "4",
        "--validation.split",
        "4",
        "--validation.interval_steps",
        "4",
        "--log_interval_steps",
        "2",
    )
    names = {"dataset": [one.name, "second.jsonl"], "channel": ["a", "b", "other"]}[curves]
    result = runs.train(experiment)
    saved = json.loads((result.folder / "experiment.json").read_text())
    assert saved["data"]["sources"] == names
    lines = [json.loads(line) for line in (result.folder / "logging.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step_number"] for line in training] == [1, 2, 4]
    last = training[-1]
    assert {f"{kind}/{name}" for kind in ("loss", "token_acc") for name in names[:2]} <= set(last)
    assert sum(last[f"examples/{name}"] for name in names) > 8
    # the two losses lie around that of all, which is of one step less
    assert min(last[f"loss/{name}"] for name in names[:2]) < 1.2 * last["loss"]
    (validated,) = [line for line in lines if "eval_loss" in line]
    if curves == "channel":
        assert {"eval_loss/a", "eval_loss/b"} & set(validated)
    boards = b"".join(path.read_bytes() for path in (result.folder / "tensorboard").iterdir())
    assert f"loss/{names[0]}".encode() in boards
