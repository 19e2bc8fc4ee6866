"""Adapters of experts in PEFT folders: PEFT's own are read as it means them, and ours add what they add here.

`tests/golden/adapters/qwen3_vl_moe` is what PEFT made (`make_expert_adapters`); `every_peft` asks PEFT itself.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jvlm.adapters import neutral
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.merge import merge
from jvlm.adapters.peft_read import read_peft
from jvlm.adapters.peft_readers import reader_problems
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.targets import resolve
from jvlm.adapters.weights import Target
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.weights import hf
from jvlm.weights.table import WeightError
from tests import quick
from tests.adapters import golden

ROOT = golden.ROOT / "qwen3_vl_moe"
CASES = ("both", "gate_up_of_a_layer")
EXPERTS = "decoder.blocks.layer.mlp."
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.language_model.layers."
ADAPTER = AdapterConfig(rank=3, alpha=6.0, targets=("decoder",), rank_pattern=((r".*experts\.gate_proj\.2", 5),))


@pytest.fixture(scope="module")
def config():
    return hf.read_config(ROOT)


def added(weights, config):
    """What an adapter adds to each parameter of experts, outputs before inputs, by the names of transformers."""
    experts, result = config.decoder.mlp.experts, {}
    for layer in range(config.decoder.num_layers):
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            columns = []
            for part in parts:
                shape = vlm.parameters(vlm.abstract(config))[EXPERTS + part].get_value().shape[2:]
                lows = [weights.low_rank.get(Target(EXPERTS + part, (layer, e))) for e in range(experts)]
                columns.append([np.zeros(shape) if low is None else low.scale * low.a @ low.b for low in lows])
            value = np.concatenate(columns, -1).swapaxes(1, 2)
            if value.any():
                result[f"model.language_model.layers.{layer}.mlp.experts.{name}"] = value
    return result


def assert_adds(found, expected):
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-6, err_msg=name)


def trained(config, adapter=ADAPTER):
    """(base, the weights of an adapter that is not zero)."""
    base = quick.random_model(config)
    weights, rng = extract(attach(base, adapter)), np.random.default_rng(0)
    low_rank = {
        target: dataclasses.replace(low, b=rng.standard_normal(low.b.shape).astype(np.float32) / 4)
        for target, low in weights.low_rank.items()
    }
    return base, dataclasses.replace(weights, low_rank=low_rank)


@pytest.fixture(scope="module")
def ours(config):
    return trained(config)


def by_peft_s_rule(folder, config):
    """What a folder adds to the parameters of experts by the rule that PEFT documents for its ParamWrapper."""
    settings, tensors = json.loads((folder / SETTINGS).read_text()), load_file(folder / TENSORS)
    experts, result = config.decoder.mlp.experts, {}
    for layer in range(config.decoder.num_layers):
        for name, inside in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            a, b = (tensors[f"{PREFIX}{layer}.mlp.experts{inside}.lora_{part}.weight"] for part in "AB")
            rank = settings["rank_pattern"].get(name, settings["r"])
            scale = settings["alpha_pattern"].get(name, settings["lora_alpha"]) / rank
            a, b = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts)
            delta = scale * np.einsum("ore,eri->eoi", b, a)
            result[f"model.language_model.layers.{layer}.mlp.experts.{name}"] = delta
    return result


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_adds_what_it_added_there_and_is_written_again_as_it_was(case, config, tmp_path):
    weights = read_peft(ROOT / case, config)
    assert_adds(added(weights, config), load_file(ROOT / case / "expected.safetensors"))
    write_peft(weights, config, tmp_path)
    ours, theirs = load_file(tmp_path / TENSORS), load_file(ROOT / case / TENSORS)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    settings, wanted = (json.loads((folder / SETTINGS).read_text()) for folder in (tmp_path, ROOT / case))
    assert {key: settings[key] for key in ("r", "lora_alpha", "use_rslora")} == {
        key: wanted[key] for key in ("r", "lora_alpha", "use_rslora")
    }


def test_what_is_written_adds_what_it_adds_here_and_is_read_again(ours, config, tmp_path):
    _, weights = ours
    write_peft(weights, config, tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    assert settings["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert settings["rank_pattern"] == {"gate_up_proj": 8}  # 5 of one expert's gate, and 3
    assert_adds(by_peft_s_rule(tmp_path, config), added(weights, config))
    again = read_peft(tmp_path, config)
    assert_adds(added(again, config), added(weights, config))
    one = Target(f"{EXPERTS}up", (0, 1))
    np.testing.assert_array_equal(again.low_rank[one].a, weights.low_rank[one].a)
    np.testing.assert_array_equal(again.low_rank[one].b, weights.low_rank[one].b)
    plain = neutral.plain(weights)
    write_peft(plain, config, tmp_path / "plain")
    assert_adds(by_peft_s_rule(tmp_path / "plain", config), added(weights, config))


def test_a_file_whose_first_matrix_meets_the_outputs_is_read_by_its_shapes(config, tmp_path):
    """PEFT >= 0.20 wrote it with transformers 4.57, and PEFT 0.18 with transformers 5."""
    shutil.copytree(ROOT / "both", tmp_path / "other")
    tensors, experts = load_file(ROOT / "both" / TENSORS), config.decoder.mlp.experts
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
        tensors[name] = np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(-1, b.shape[0])
        tensors[other] = np.ascontiguousarray(a.transpose(2, 1, 0)).reshape(a.shape[2], -1)
    save_file(tensors, tmp_path / "other" / TENSORS)
    found = added(read_peft(tmp_path / "other", config), config)
    assert_adds(found, load_file(ROOT / "both/expected.safetensors"))


def test_experts_are_picked_by_the_names_that_peft_has_for_them(config):
    plan = resolve(AdapterConfig(rank=2, targets=("mlp.experts.gate_up_proj",)), config)
    assert [group.path for group in plan.groups] == [f"{EXPERTS}gate", f"{EXPERTS}up"]
    assert all(all(group.ranks) for group in plan.groups)
    config_of_a_folder = read_peft(ROOT / "both", config).config
    assert {g.path for g in resolve(config_of_a_folder, config).groups} == {
        *(EXPERTS + part for part in ("gate", "up", "down")),
        "decoder.blocks.layer.attention.q.kernel",
    }


def test_a_merged_model_has_the_sums_of_experts_and_their_adapters(ours):
    base, weights = ours
    merged, before = (vlm.parameters(model) for model in (merge(base, weights), base))
    checked = 0
    for target, low in weights.low_rank.items():
        expected = np.asarray(before[target.path].get_value())[target.index] + low.scale * low.a @ low.b
        np.testing.assert_allclose(np.asarray(merged[target.path].get_value())[target.index], expected, atol=1e-6)
        checked += target.path.startswith(EXPERTS)
    assert checked == 2 * 3 * base.config.decoder.mlp.experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "lora_B"}, r"missing: model.language_model.layers.0.mlp.experts.gate_up_proj, .*lora_B"),
        ({"target_parameters": ["experts.down_proj"]}, r"tensors without a target: .*base_layer\.lora_A"),
        ({"target_parameters": ["experts.up_proj"]}, r"'experts.up_proj' names no parameter of experts"),
        ({"r": 2}, r"wrong shape: lora_A and lora_B of .*gate_up_proj are"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message, config, tmp_path):
    shutil.copytree(ROOT / "both", tmp_path / "adapter")
    drop = changes.pop("drop", None)
    path = tmp_path / "adapter" / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    kept = {name: v for name, v in tensors.items() if drop is None or "experts" not in name or drop not in name}
    save_file(kept, tmp_path / "adapter" / TENSORS)
    with pytest.raises(WeightError, match=message):
        read_peft(tmp_path / "adapter", config)


def test_what_no_peft_folder_holds_beside_experts_is_refused_with_what_to_do(ours, config, tmp_path):
    _, weights = ours
    with pytest.raises(UserError, match=r"layout 'old' is for PEFT before 0\.17.*merge"):
        write_peft(weights, config, tmp_path, layout="old")
    with_dropout = dataclasses.replace(weights, config=dataclasses.replace(weights.config, dropout=0.1))
    with pytest.raises(UserError, match="no dropout in an adapter that has experts"):
        write_peft(with_dropout, config, tmp_path)
    whole = {Target(f"{EXPERTS}up", (0,)): np.zeros((config.decoder.mlp.experts, 24, 8), np.float32)}
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is trained whole.*merge"):
        write_peft(dataclasses.replace(weights, low_rank={}, parameters=whole), config, tmp_path)
    assert any("adapters of experts" in line for line in reader_problems(weights, config, "sglang"))
    assert not any("alone" in line for line in reader_problems(weights, config, "vllm"))
    down = {t: low for t, low in weights.low_rank.items() if "mlp" not in t.path or t.path.endswith("down")}
    found = reader_problems(dataclasses.replace(weights, low_rank=down), config, "vllm")
    assert any("down_proj alone" in line for line in found)
