"""The trainer as a library: tasks and hooks of a user's own, from Python and from a configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvlm.data import pipeline
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.training import runs, starting_model
from jvlm.training.hooks import Hook
from jvlm.training.supervised import next_tokens, token_log_probs
from jvlm.training.task import Loss, Mean, Task
from jvlm.training.trainer import Trainer
from tests.training import support


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """A batch with a field of its own: the advantage of each packed sequence."""

    packed: PackedBatch
    advantage: Any


@dataclasses.dataclass(frozen=True)
class PolicyLike(Task):
    """What a policy loss needs: log-probabilities, a reference model, an advantage, a metric of its own."""

    kl_weight: float = 0.1
    needs_reference = True

    def batch_of(self, packed) -> Scored:
        return Scored(packed.batch, np.linspace(1.0, 2.0, len(packed.batch.tokens), dtype=np.float32))

    def loss(self, model, batch: Scored, *, reference=None, rng=None, denominators=None) -> Loss:
        _, weights = next_tokens(batch.packed)
        log_probs = token_log_probs(model, batch.packed, block=50)
        change = log_probs - token_log_probs(reference, batch.packed, block=50)
        weight = weights.sum()
        kl = (weights * change**2).sum()
        policy = -(weights * batch.advantage[:, None] * log_probs).sum()
        return Loss(policy + self.kl_weight * kl, weight, {"kl": Mean(kl, weight)})


class Recorder(Hook):
    """Writes down what it is told, and stops after step 3."""

    def __init__(self, stop_at: int = 3):
        self.events, self.stop_at = [], stop_at

    def on_train_start(self, trainer):
        self.events.append(("start", trainer.step))

    def on_batch(self, trainer, packed):
        self.events.append(("batch", trainer.step + 1, len(packed)))

    def on_step_end(self, trainer, result):
        self.events.append(("end", result.step, {name: float(value) for name, value in result.metrics.items()}))
        if result.step == self.stop_at:
            trainer.stop("enough")

    def on_stop(self, trainer, error):
        self.events.append(("stop", trainer.step, error))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return support.write_examples(tmp_path_factory.mktemp("examples"), 12)


def test_a_task_and_a_hook_of_ones_own_train_some_parameters_without_editing_any_file(tmp_path, examples):
    experiment = support.experiment(tmp_path, examples)
    model, processor = starting_model.start_model(experiment)
    before = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}
    batches, _ = pipeline.training_data(processor, experiment.data, seed=0)
    first = next(iter(batches)).batch
    hook = Recorder()
    trainer = Trainer(
        model,
        PolicyLike(),
        optax.sgd(0.1),
        is_trainable=lambda path, variable: path.startswith("connector."),
        gradient_accumulation_steps=2,
        hooks=[hook],
    )
    trainer.fit(batches, steps=8)
    assert [event[0] for event in hook.events] == ["start", *["batch", "end"] * 3, "stop"]
    assert [event[:2] for event in hook.events if event[0] == "stop"] == [("stop", 3)]
    assert (trainer.step, trainer.stop_reason) == (3, "enough")
    assert all(event[2] == 2 for event in hook.events if event[0] == "batch")
    metrics = [event[2] for event in hook.events if event[0] == "end"]
    assert metrics[0]["kl"] < 1e-9 < metrics[2]["kl"], "the reference is the model before the first step"
    after = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(trainer.model).items()}
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("connector.")}

    # the log-probabilities are those of all the logits at once, in float64
    logits = np.asarray(trainer.model(first), np.float64)[:, :-1]
    expected = np.take_along_axis(logits, first.tokens[:, 1:, None], -1)[..., 0]
    expected = expected - np.log(np.exp(logits).sum(-1))
    ours = np.asarray(jax.jit(token_log_probs, static_argnums=2)(trainer.model, first, 50))[:, :-1]
    counted = (first.loss_weights[:, 1:] > 0) & (first.segment_ids[:, 1:] == first.segment_ids[:, :-1])
    np.testing.assert_allclose(ours[counted], expected[counted], atol=2e-5)
    assert counted.any()
    assert not ours[~counted].any()


class Constant(Hook):
    """Adds a number to each line of the log."""

    def log_values(self, trainer):
        return {"answer": 42.0}


@dataclasses.dataclass(frozen=True)
class Halved(Task):
    """The negative log-probability of the supervised tokens, times a factor."""

    factor: float = 0.5

    def loss(self, model, batch, *, reference=None, rng=None, denominators=None) -> Loss:
        _, weights = next_tokens(batch)
        total = -self.factor * (weights * token_log_probs(model, batch)).sum()
        return Loss(total, weights.sum(), {"factor": Mean(jnp.float32(self.factor), jnp.float32(1.0))})


def test_task_and_hooks_of_a_configuration_are_run_logged_and_saved_and_a_changed_task_is_refused(tmp_path, examples):
    experiment = support.experiment(tmp_path, examples, "--steps", "2", task=Halved(), hooks=(Constant(),))
    result = runs.train(experiment)
    lines = [json.loads(line) for line in (result.folder / "logging.jsonl").read_text().splitlines()]
    assert [(line["answer"], line["factor"]) for line in lines] == [(42.0, 0.5)] * 2
    saved = json.loads((result.folder / "experiment.json").read_text())
    assert saved["task"]["type"].endswith("test_trainer.Halved")
    assert saved["task"]["factor"] == 0.5
    assert [hook["type"].rpartition(".")[2] for hook in saved["hooks"]] == ["Constant"]
    runs.train(dataclasses.replace(experiment, hooks=()))
    with pytest.raises(UserError, match=r"task.factor: 0.5 -> 0.25"):
        runs.train(dataclasses.replace(experiment, task=Halved(0.25)))
    with pytest.raises(UserError, match="hooks need a name each"):
        Trainer(result.model, hooks=[Constant(), Constant()]).fit([], steps=1)


def test_parameters_are_frozen_by_patterns_of_their_paths(tmp_path, examples):
    options = ("--optimizer.freeze", "decoder.*", "encoder.patch_embed.*", "--steps", "2")
    experiment = support.experiment(tmp_path, examples, *options)
    before = {
        p: np.asarray(v.get_value()) for p, v in vlm.parameters(starting_model.start_model(experiment)[0]).items()
    }
    after = vlm.parameters(runs.train(experiment).model)
    frozen = {path for path in before if np.array_equal(before[path], after[path].get_value())}
    assert frozen == {path for path in before if path.startswith(("decoder.", "encoder.patch_embed."))}
    assert 0 < len(frozen) < len(before)
    with pytest.raises(UserError, match=r"optimizer.freeze: 'decodr.\*' matches no parameter; there are"):
        runs.train(support.experiment(tmp_path, examples, "--name", "b", "--optimizer.freeze", "decodr.*"))
    with pytest.raises(UserError, match="nothing would be trained"):
        runs.train(support.experiment(tmp_path, examples, "--name", "b", "--optimizer.freeze", "*"))
