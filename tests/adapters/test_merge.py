"""Merged models answer as PEFT's adapters do, in memory and from folder to folder."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jvlm.adapters import merge_folder as merging
from jvlm.adapters import neutral
from jvlm.adapters.attach import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.merge import Merged, merge, merge_matrix, needs_own_head, untie
from jvlm.adapters.merge_folder import merge_folder
from jvlm.adapters.peft_load import with_adapter
from jvlm.adapters.peft_modules import entries
from jvlm.adapters.peft_read import read_peft
from jvlm.adapters.peft_readers import reader_problems
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.weights import AdapterWeights, LowRank, Target, TokenRows
from jvlm.errors import UserError
from jvlm.weights import hf, table
from jvlm.weights.table import WeightError
from tests.adapters import golden

BOUND = 5e-5
BASE = golden.ROOT / "qwen2_5_vl/base"
MERGED = [case for case in golden.CASES if (golden.ROOT / "/".join(case) / "expected_merged.safetensors").is_file()]
TIED = ["lm_head", "embed_tokens"]


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    """The golden Qwen2.5-VL without its head."""
    folder = tmp_path_factory.mktemp("tied")
    values = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    tensors = {name: v for name, v in load_file(BASE / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder):
    return hf.load_weights(folder, hf.read_config(folder))


def logits(model, family="qwen2_5_vl"):
    return np.asarray(model(golden.batch(family)))


@pytest.mark.parametrize(("family", "case"), MERGED)
def test_merged_matrices_are_those_of_peft(family, case):
    config = golden.base(family).config
    by_target = {(e.path, e.layer): e for e in entries(config)}
    tensors = load_file(golden.ROOT / family / "base/model.safetensors")
    weights = read_peft(golden.ROOT / family / case, config)
    merged = Merged(weights, lambda *place: by_target[place].to_param(tensors[by_target[place].name]))
    expected = load_file(golden.ROOT / family / case / "expected_merged.safetensors")
    assert expected
    for name, value in expected.items():
        entry = next(e for e in by_target.values() if e.name == table.hf_format(config).canonical(name))
        found = entry.to_checkpoint(merged(entry.path, entry.layer))
        np.testing.assert_allclose(found, value, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("family", "case"), golden.CASES)
def test_a_merged_model_has_the_logits_of_pefts_adapter(family, case):
    weights = read_peft(golden.ROOT / family / case, golden.base(family).config)
    merged = merge(golden.base(family), weights)
    np.testing.assert_allclose(logits(merged, family), golden.expected(family, case)["logits"], atol=BOUND, rtol=0)


def test_adapters_in_a_model_merge_as_their_weights_do():
    weights = read_peft(golden.ROOT / "qwen2_5_vl/bias_and_saved", golden.base("qwen2_5_vl").config)
    merged = merge(attach(golden.base("qwen2_5_vl"), weights))
    assert merged.adapters is None
    np.testing.assert_array_equal(logits(merged), logits(merge(golden.base("qwen2_5_vl"), weights)))


@pytest.mark.parametrize("case", TIED)
def test_a_tied_head_is_untied_where_an_adapter_is_on_one_of_both(tmp_path, tied_base, case):
    """PEFT adds what it learned for one of them to both; its answers before merging are the right ones."""
    expected = load_file(golden.ROOT / "tied" / case / "expected.safetensors")["logits"]
    report = merge_folder(tied_base, golden.ROOT / "tied" / case, tmp_path / "merged")
    assert report.untied
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    np.testing.assert_allclose(logits(load(tmp_path / "merged")), expected, atol=BOUND, rtol=0)
    base = load(tied_base)
    model = with_adapter(base, golden.ROOT / "tied" / case)
    assert model.config.decoder.tie_word_embeddings == (case == "embed_tokens")  # the head is in nobody's way there
    np.testing.assert_allclose(logits(model), expected, atol=BOUND, rtol=0)
    weights = read_peft(golden.ROOT / "tied" / case, base.config)
    assert needs_own_head(weights, base.config)
    np.testing.assert_allclose(logits(merge(base, weights)), expected, atol=BOUND, rtol=0)


def embedding_saved(folder, *names):
    """The golden LoRA beside another embedding table, saved under these names."""
    shutil.copytree(golden.ROOT / "qwen2_5_vl/lora", folder)
    path = folder / "adapter_config.json"
    modules = [name.split(".")[-2] for name in names]
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": modules}))
    table = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    tensors = load_file(folder / "adapter_model.safetensors") | {f"base_model.model.{name}": table for name in names}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return table


def test_a_tied_embedding_that_is_saved_alone_leaves_the_head_and_saved_twice_stays_tied(tmp_path, tied_base):
    """So does PEFT (`modules_to_save` of a tied model)."""
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    embedding_saved(tmp_path / "alone", names[0])
    table = embedding_saved(tmp_path / "both", *names)
    before = load_file(tied_base / "model.safetensors")["model.embed_tokens.weight"]
    assert merge_folder(tied_base, tmp_path / "alone", tmp_path / "merged_alone").untied
    found = load_file(tmp_path / "merged_alone/model.safetensors")
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], table)
    np.testing.assert_array_equal(found["lm_head.weight"], before)
    assert not merge_folder(tied_base, tmp_path / "both", tmp_path / "merged_both").untied
    found = load_file(tmp_path / "merged_both/model.safetensors")
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], table)
    assert "lm_head.weight" not in found
    base = load(tied_base)
    with pytest.raises(UserError, match="give the folder of the base"):
        read_peft(tmp_path / "alone", base.config)
    model = with_adapter(base, tmp_path / "alone")
    np.testing.assert_array_equal(model.decoder.head.kernel.get_value(), before.T)
    write_peft(read_peft(tmp_path / "both", base.config), base.config, tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    for name in names:
        np.testing.assert_array_equal(again[f"base_model.model.{name}"], table)


def test_a_tied_head_stays_tied_under_other_adapters(tmp_path, tied_base):
    report = merge_folder(tied_base, golden.ROOT / "qwen2_5_vl/lora", tmp_path / "merged")
    assert not report.untied
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    base = load(tied_base)
    head = untie(base).decoder.head.kernel.get_value()
    np.testing.assert_array_equal(head, base.decoder.embedding.get_value().T)


@pytest.mark.parametrize("case", ["lora", "bias_and_saved", "dora_conv_embed"])
def test_a_merged_folder_has_the_logits_of_pefts_adapter_and_leaves_the_rest(tmp_path, case):
    report = merge_folder(BASE, golden.ROOT / "qwen2_5_vl" / case, tmp_path / "merged")
    model = load(tmp_path / "merged")
    np.testing.assert_allclose(logits(model), golden.expected("qwen2_5_vl", case)["logits"], atol=BOUND, rtol=0)
    before, after = load_file(BASE / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert after.keys() == before.keys()
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set(report.changed)
    assert report.unchanged == ()
    assert {p.name for p in tmp_path.iterdir()} == {"merged"}


def test_sums_of_a_bfloat16_base_are_rounded_once(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    stored = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(BASE / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors")
    shutil.copyfile(BASE / "config.json", base / "config.json")
    adapter = golden.ROOT / "qwen2_5_vl/dora"
    merge_folder(base, adapter, tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    theirs = load_file(adapter / "adapter_model.safetensors")
    name = "language_model.layers.1.mlp.down_proj"
    a, b, m = (
        theirs[f"base_model.model.model.{name}.{part}"].astype(np.float64)
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    value = stored["model.layers.1.mlp.down_proj.weight"].astype(np.float64) + 2.0 * b @ a
    value *= (m / np.linalg.norm(value, axis=1))[:, None]
    expected = value.astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["model.layers.1.mlp.down_proj.weight"], expected)
    assert all(value.dtype == ml_dtypes.bfloat16 for value in found.values())


def test_rows_of_tokens_replace_those_of_both_tables():
    rng = np.random.default_rng(0)
    paths = ("decoder.embedding", "decoder.head.kernel")
    rows = {path: TokenRows(np.array([95, 3]), rng.standard_normal((2, 32)).astype(np.float32)) for path in paths}
    base = golden.base("qwen2_5_vl")
    merged = merge(base, AdapterWeights(AdapterConfig(), {}, {}, rows)).decoder
    embedding, head = np.array(base.decoder.embedding.get_value()), np.array(base.decoder.head.kernel.get_value())
    embedding[[95, 3]] = rows[paths[0]].rows
    head[:, 95], head[:, 3] = rows[paths[1]].rows
    np.testing.assert_array_equal(merged.embedding.get_value(), embedding)
    np.testing.assert_array_equal(merged.head.kernel.get_value(), head)


def test_rows_of_a_tied_table_and_an_adapter_that_unties_it_are_refused(tied_base):
    config = hf.read_config(tied_base)
    low = LowRank(np.ones((32, 1)), np.ones((1, 96)), 1.0, 1.0)
    rows = {"decoder.embedding": TokenRows(np.array([3]), np.ones((1, 32)))}
    weights = AdapterWeights(AdapterConfig(), {Target("decoder.head.kernel"): low}, {}, rows)
    with pytest.raises(UserError, match="rows of tokens count for the embedding and the head"):
        needs_own_head(weights, config)


def test_large_matrices_are_summed_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    base, a, b, m = (rng.standard_normal(shape) for shape in ((6, 10), (6, 2), (2, 10), (10,)))
    low = LowRank(a, b, 0.5, 1.0, magnitude=np.abs(m))
    monkeypatch.setattr("jvlm.adapters.merge._BLOCK", 18)
    total = base + 0.5 * a @ b
    expected = total * np.abs(m) / np.linalg.norm(total, axis=0)
    np.testing.assert_allclose(merge_matrix(base, low), expected, rtol=1e-6)


def test_a_folder_is_replaced_only_by_force_and_only_if_it_is_a_model(tmp_path):
    adapter, target = golden.ROOT / "qwen2_5_vl/lora", tmp_path / "merged"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for force, named in ((False, "exists"), (True, "holds no model")):
        with pytest.raises(UserError, match=named):
            merge_folder(BASE, adapter, target, force=force)
    assert [p.name for p in target.iterdir()] == ["notes.txt"]
    (target / "config.json").write_text("{}")
    merge_folder(BASE, adapter, target, force=True)
    assert not (target / "notes.txt").exists()
    with pytest.raises(UserError, match="holds the base"):
        merge_folder(target, adapter, target, force=True)


def test_an_adapter_that_changes_nothing_is_not_merged(tmp_path):
    config = golden.base("qwen2_5_vl").config
    weights = read_peft(golden.ROOT / "qwen2_5_vl/lora", config)
    zero = {t: dataclasses.replace(low, b=np.zeros_like(low.b)) for t, low in weights.low_rank.items()}
    with pytest.raises(UserError, match="changes none of its 26 tensors"):
        merge_folder(BASE, dataclasses.replace(weights, low_rank=zero), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    first, *_ = zero
    report = merge_folder(
        BASE, dataclasses.replace(weights, low_rank={**weights.low_rank, first: zero[first]}), tmp_path / "m"
    )
    assert len(report.unchanged) == 1
    assert len(report.changed) == 25


def test_what_was_not_written_is_noticed(tmp_path, monkeypatch):
    write = merging.safetensors_files.write

    def forgetful(folder, tensors, *args):
        write(folder, [(n, d, s, lambda r=r: np.zeros_like(r())) for n, d, s, r in tensors], *args)

    monkeypatch.setattr(merging.safetensors_files, "write", forgetful)
    with pytest.raises(WeightError, match="26 tensors were not read back"):
        merge_folder(BASE, golden.ROOT / "qwen2_5_vl/lora", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_the_model_does_not_have_are_named():
    low = LowRank(np.ones((4, 1)), np.ones((1, 4)), 1.0, 1.0)
    weights = AdapterWeights(AdapterConfig(), {Target("decoder.other.kernel"): low})
    with pytest.raises(UserError, match=r"decoder\.other\.kernel"):
        merge(golden.base("qwen2_5_vl"), weights)


def test_the_plain_form_adds_the_same(tmp_path):
    base = golden.base("qwen2_5_vl")
    weights = read_peft(golden.ROOT / "qwen2_5_vl/rslora", base.config)
    plain = neutral.plain(weights)
    write_peft(plain, base.config, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (6, 6, False)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    for target, low in read_peft(tmp_path, base.config).low_rank.items():
        before = weights.low_rank[target]
        np.testing.assert_allclose(low.a @ low.b, before.scale * (before.a @ before.b), atol=1e-6)
    with pytest.raises(UserError, match="DoRA"):
        neutral.plain(read_peft(golden.ROOT / "qwen2_5_vl/dora", base.config))


def test_weighted_adapters_add_as_pefts_cat_does():
    values = load_file(golden.ROOT / "small/weighted_adapters.safetensors")
    target = Target("decoder.head.kernel")

    def adapter(name, scale):
        low = LowRank(values[f"{name}.lora_A"].T, values[f"{name}.lora_B"].T, scale, 2 * scale)
        return AdapterWeights(AdapterConfig(rank=2), {target: low})

    scales = {}
    for name in "ab":
        product = values[f"{name}.lora_B"] @ values[f"{name}.lora_A"]
        scales[name] = float((values[f"delta.{name}"] / product).mean())
    joined = neutral.concatenate([(adapter("a", scales["a"]), 0.7), (adapter("b", scales["b"]), 0.3)])
    low = joined.low_rank[target]
    assert (low.rank, low.scale) == (4, 1.0)
    np.testing.assert_allclose((low.a @ low.b).T, values["delta.cat"], atol=1e-6)


def test_adapters_that_have_no_sum_are_not_added():
    config = golden.base("qwen2_5_vl").config
    for case, named in (("dora", "DoRA"), ("bias_and_saved", r"connector\.norm\.scale")):
        weights = read_peft(golden.ROOT / "qwen2_5_vl" / case, config)
        with pytest.raises(UserError, match=named):
            neutral.concatenate([(weights, 1.0), (weights, 1.0)])


@pytest.mark.parametrize("case", ["pissa", "olora", "pissa_rslora"])
def test_adapters_of_a_changed_base_become_plain_lora_of_the_original(case):
    values = load_file(golden.ROOT / "small/inits_and_dora.safetensors")
    a, b = values[f"{case}.A"].T + 0.1, values[f"{case}.B"].T - 0.2  # as if trained
    scale = float((values[f"{case}.BA"] / (values[f"{case}.B"] @ values[f"{case}.A"])).mean())
    rslora = case.endswith("rslora")
    alpha = scale * (2**0.5 if rslora else 2)
    target = Target("decoder.head.kernel")
    weights = AdapterWeights(
        AdapterConfig(rank=2, alpha=alpha, use_rslora=rslora), {target: LowRank(a, b, scale, alpha)}
    )
    found = neutral.subtract_initial(weights, case.partition("_")[0], lambda _: values["W"].T)
    low = found.low_rank[target]
    expected = values[f"{case}.W_base"].T + scale * (a @ b)
    np.testing.assert_allclose(merge_matrix(values["W"].T, low), expected, atol=5e-6)
    assert low.rank == found.config.rank == 4
    assert low.scale == pytest.approx(low.alpha / (2.0 if rslora else 4.0))


def test_an_unconverted_pissa_folder_is_converted_with_its_base(tmp_path):
    """What PEFT would rebuild from its own decomposition: base less its first directions, plus the adapter."""
    config, model = golden.base("qwen2_5_vl").config, golden.base("qwen2_5_vl")
    shutil.copytree(golden.ROOT / "qwen2_5_vl/lora", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    merge_folder(BASE, tmp_path / "adapter", tmp_path / "merged")
    tensors = load_file(BASE / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    u, s, vt = np.linalg.svd(tensors[name].astype(np.float64), full_matrices=False)
    theirs = load_file(tmp_path / "adapter/adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    expected = tensors[name] - (u[:, :4] * s[:4]) @ vt[:4]
    expected += 2.0 * theirs[f"{key}.lora_B.weight"] @ theirs[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(load_file(tmp_path / "merged/model.safetensors")[name], expected, atol=2e-6)
    assert with_adapter(model, tmp_path / "adapter").adapters.groups[0].rank == 8
    with pytest.raises(UserError, match="give the folder of the base"):
        read_peft(tmp_path / "adapter", config)


READERS = {
    "vllm": {
        "lora": ["ignored without enable_tower_connector_lora"],
        "dora": ["refused: DoRA", "ignored"],
        "rslora": ["dropped in silence: ranks and alphas by pattern", "ignored"],
        "bias_and_saved": ["refused: parameters saved whole", "refused: biases", "ignored"],
        "conv_embed": ["refused: adapters of the embedding or head", "ignored"],
    },
    "sglang": {
        "lora": ["dropped in silence: 12 adapters"],
        "rslora": ["dropped in silence: rsLoRA", "dropped in silence: 8 adapters"],
        "dora": ["refused: DoRA", "dropped in silence: 12 adapters"],
    },
    "llama.cpp": {
        "lora": ["an mmproj file has none"],
        "rslora": ["dropped in silence: rsLoRA", "mmproj"],
        "dora": ["refused: DoRA's magnitudes", "mmproj"],
    },
    "transformers": {"lora": [], "rslora": [], "dora": ["loses DoRA's magnitudes"], "bias_and_saved": ["lora_bias"]},
}


@pytest.mark.parametrize("reader", READERS)
def test_what_readers_drop_is_named(reader):
    config = golden.base("qwen2_5_vl").config
    for case, named in READERS[reader].items():
        found = reader_problems(read_peft(golden.ROOT / "qwen2_5_vl" / case, config), config, reader)
        assert len(found) == len(named), (case, found)
        for line, text in zip(found, named, strict=True):
            assert text in line
    lora = read_peft(golden.ROOT / "qwen2_5_vl/rslora", config)
    text = {t: low for t, low in lora.low_rank.items() if t.path.startswith("decoder.")}
    assert reader_problems(neutral.plain(dataclasses.replace(lora, low_rank=text)), config, reader) == []
    with pytest.raises(UserError, match="unknown reader"):
        reader_problems(lora, config, "ollama")
