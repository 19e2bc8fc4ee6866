"""Runs that train adapters: what changes, what checkpoints hold, and that a run which was stopped is the same."""

import dataclasses
import json

import numpy as np
import pytest

import jvlm
from jvlm.adapters.attach import extract
from jvlm.adapters.config import AdapterConfig
from jvlm.models import vlm
from jvlm.training import runs
from jvlm.training.config import ExportConfig
from jvlm.training.hooks import Hook
from jvlm.weights import run_dir
from tests.training import support

LORA = AdapterConfig(
    rank=2,
    use_dora=True,
    dropout=0.1,
    targets=("all-linear", "patch_embed", "embed", "head"),
    exclude=("connector",),
    rank_pattern=(("layers.1.self_attn.q_proj", 3),),
    train_modules=("connector",),
)

OPTIONS = ("--optimizer.learning_rate", "1e-3", "--model.decoder.tie_word_embeddings", "False")


def values_of(model):
    return {path: np.asarray(v.get_value()) for path, v in vlm.variables(model).items()}


def experiment(folder, base, examples, **changes):
    fields = {"adapter": LORA, "init_from": str(base), "export": ExportConfig(enabled=False), "steps": 4, **changes}
    return support.experiment(folder, examples, *OPTIONS, **fields)


class StopAfter(Hook):
    def __init__(self, step):
        self.at = step

    def on_step_end(self, trainer, result):
        if trainer.step == self.at:
            trainer.stop("the test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, and a run of adapters on it."""
    folder = tmp_path_factory.mktemp("adapters")
    examples = support.write_examples(folder / "data", 12)
    from jvlm.training.starting_model import start_model

    model, processor = start_model(support.experiment(folder, examples, *OPTIONS))
    jvlm.save(model, processor, folder / "base")
    result = runs.train(experiment(folder, folder / "base", examples))
    return folder, examples, values_of(model), result


def test_exactly_what_was_asked_for_is_trained_and_the_base_is_bit_equal(trained):
    folder, _, base, result = trained
    after = values_of(result.model)
    changed = {path for path, value in base.items() if not np.array_equal(value, after[path])}
    assert changed == {path for path in base if path.startswith("connector.")}
    before = values_of(runs.start_model(experiment(folder, folder / "base", folder / "data" / "examples.jsonl"))[0])
    moved = {path for path in after if ".adapter." in path and not np.array_equal(before[path], after[path])}
    constants = {path for path in after if path.endswith(".adapter.scale")}
    assert moved == {path for path in after if ".adapter." in path} - constants


def test_a_checkpoint_holds_the_adapters_alone_and_the_run_loads(trained):
    folder, _, base, result = trained
    stored = run_dir.stored_paths(run_dir.params_folder(folder / "run"))
    assert stored == {p for p in values_of(result.model) if ".adapter." in p or p.startswith("connector.")}
    record = json.loads((folder / "run" / "frozen.json").read_text())
    assert set(record["fingerprints"]) == {path for path in base if not path.startswith("connector.")}
    loaded, _ = jvlm.load(folder / "run")
    after = values_of(result.model)
    assert all(np.array_equal(after[path], value) for path, value in values_of(loaded).items())


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(trained, tmp_path):
    folder, examples, _, result = trained
    begun = experiment(tmp_path, folder / "base", examples)
    with pytest.raises(runs.Interrupted):
        runs.train(dataclasses.replace(begun, hooks=(StopAfter(2),)))
    again = values_of(runs.train(begun).model)
    assert all(np.array_equal(again[path], value) for path, value in values_of(result.model).items())


def test_another_run_goes_on_with_the_adapter_of_a_run(trained, tmp_path):
    folder, examples, _, result = trained
    goes_on = experiment(tmp_path, folder / "base", examples, adapter=None, adapters_from=str(folder / "run"))
    model, _ = runs.start_model(goes_on)
    given, found = extract(result.model), extract(model)
    assert found.config == LORA
    for target, one in given.low_rank.items():
        for name in ("a", "b", "magnitude"):
            np.testing.assert_array_equal(getattr(one, name), getattr(found.low_rank[target], name))
    after = values_of(model)
    assert all(np.array_equal(after[t.path][t.index], value) for t, value in given.parameters.items())
