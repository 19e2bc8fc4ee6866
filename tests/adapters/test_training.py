"""Runs that train adapters: what changes, what checkpoints hold, and that a run which was stopped is the same."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import jvlm
from jvlm.adapters.attach import extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_read import read_peft
from jvlm.models import vlm
from jvlm.training import runs
from jvlm.training.config import ExportConfig, Stage
from jvlm.training.hooks import Hook
from jvlm.training.interruption import Interrupted
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


class Begins(Hook):
    """Notes the variables that each run begins with."""

    def __init__(self):
        self.values = []

    def on_train_start(self, trainer):
        self.values.append({path: np.array(value) for path, value in values_of(trainer.model).items()})


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
    model, processor = runs.start_model(support.experiment(folder, examples, *OPTIONS))
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


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(trained, tmp_path):
    folder, examples, _, result = trained
    begun = experiment(tmp_path, folder / "base", examples)
    with pytest.raises(Interrupted):
        runs.train(dataclasses.replace(begun, hooks=(StopAfter(2),)))
    again = values_of(runs.train(begun).model)
    assert all(np.array_equal(again[path], value) for path, value in values_of(result.model).items())


@pytest.mark.slow
def test_two_runs_go_on_alike_with_the_adapter_of_a_run_and_with_its_peft_folder(trained, tmp_path):
    folder, examples, base, result = trained
    jvlm.save(result.model, result.processor, tmp_path / "peft", format="peft")
    ends = []
    for name, place in (("run", folder / "run"), ("peft", tmp_path / "peft")):
        begins = Begins()
        changes = {"adapter": None, "adapters_from": str(place), "hooks": (begins,), "steps": 2}
        goes_on = experiment(tmp_path / f"from_{name}", folder / "base", examples, **changes)
        ends.append(values_of(runs.train(goes_on).model))
        for path, value in values_of(result.model).items():
            np.testing.assert_array_equal(begins.values[0][path], value, err_msg=f"{name}: {path}")
    for path, value in ends[0].items():
        np.testing.assert_array_equal(ends[1][path], value, err_msg=path)
        is_trained = ".adapter." in path or path.startswith("connector.")
        if is_trained and not path.endswith(".scale"):
            assert not np.array_equal(value, values_of(result.model)[path]), path
        elif not is_trained:
            np.testing.assert_array_equal(value, base[path], err_msg=path)


TOKENS = ("<|im_end|>", 7)
WHOLE = AdapterConfig(
    rank=2, targets=("decoder.attention",), bias="all", train_modules=("connector",), train_tokens=TOKENS
)


@pytest.fixture(scope="module")
def staged(trained, tmp_path_factory):
    """A run in two stages of LoRA, all biases, a whole module and rows of two tokens; its files in both formats."""
    folder, examples, _, _ = trained
    to, begins = tmp_path_factory.mktemp("staged"), Begins()
    plain = experiment(to, folder / "base", examples, adapter=WHOLE, steps=2, hooks=(begins,))
    stage = Stage("first", plain.data, plain.optimizer, steps=2)
    result = runs.train(dataclasses.replace(plain, stages=(stage,)))
    jvlm.save(result.model, result.processor, to / "hf")
    jvlm.save(result.model, result.processor, to / "peft", format="peft", base=str(folder / "base"))
    return to, begins, result


@pytest.mark.slow
def test_a_stage_goes_on_with_the_adapters_of_the_stage_before_it(staged):
    to, begins, result = staged
    first, second = begins.values
    for path, value in values_of(jvlm.load(to / "run/stages/first")[0]).items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)
    moved = {path for path, value in first.items() if not np.array_equal(value, second[path])}
    assert moved == {path for path, value in values_of(result.model).items() if not np.array_equal(value, second[path])}
    assert moved == run_dir.stored_paths(run_dir.params_folder(to / "run")) - {
        path for path in first if path.endswith((".adapter.scale", "_rows.ids"))
    }
    constants = {p for p in first if p.endswith((".adapter.scale", "_rows.ids"))}
    for path, value in values_of(jvlm.load(to / "run")[0]).items():
        np.testing.assert_array_equal(value, values_of(result.model)[path])
        assert path in moved or path in constants or np.array_equal(value, first[path])


@pytest.mark.slow
def test_merged_files_differ_from_the_base_in_biases_rows_and_modules_that_were_asked_for_alone(trained, staged):
    """Read as files, by the names that transformers gives tensors."""
    folder, to = trained[0], staged[0]
    base, merged = (load_file(f / "model.safetensors") for f in (folder / "base", to / "hf"))
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    adapted = {name for name in base if re.fullmatch(r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight", name)}
    whole = {name for name in base if name.endswith(".bias") or name.startswith("visual.merger.")}
    assert len(adapted) == 8
    assert changed == tables | adapted | whole
    ids = sorted([7, staged[2].processor.tokenizer.convert_tokens_to_ids("<|im_end|>")])
    for name in tables:
        assert np.flatnonzero((base[name] != merged[name]).any(1)).tolist() == ids
    settings = json.loads((to / "peft/adapter_config.json").read_text())
    assert (settings["bias"], settings["modules_to_save"]) == ("all", ["ln_q", "mlp.0", "mlp.2"])
    assert settings["trainable_token_indices"] == {"embed_tokens": ids, "lm_head": ids}
    assert_same(read_peft(to / "peft", staged[2].model.config), extract(staged[2].model))


def assert_same(found, expected):
    assert found.low_rank.keys() == expected.low_rank.keys()
    assert found.parameters.keys() == expected.parameters.keys()
    assert found.token_rows.keys() == expected.token_rows.keys()
    for target, one in expected.low_rank.items():
        for part in ("a", "b"):
            np.testing.assert_array_equal(getattr(found.low_rank[target], part), getattr(one, part))
    for target, value in expected.parameters.items():
        np.testing.assert_array_equal(found.parameters[target], value)
    for path, rows in expected.token_rows.items():
        np.testing.assert_array_equal(found.token_rows[path].rows, rows.rows)
        np.testing.assert_array_equal(found.token_rows[path].token_ids, rows.token_ids)
