"""PEFT folders: read as PEFT means them, refused by name where they do not fit, and written so that PEFT reads them."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jvlm import families
from jvlm.adapters import peft_card, peft_modules
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_read import find_folder, read_peft
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.weights import AdapterWeights, LowRank, Target, TokenRows
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.weights import hf
from jvlm.weights.table import WeightError
from tests.adapters import golden

EMBEDDING, HEAD = "decoder.embedding", "decoder.head.kernel"
TENSORS = "adapter_model.safetensors"
FOLDERS = [
    *(f"{family}/{case}" for family, case in golden.CASES),
    "qwen2_5_vl/old_layout/dora",
    "tied/lm_head",
    "tied/embed_tokens",
]


def model_config(folder):
    family = "idefics2" if folder.startswith("idefics2") else "qwen2_5_vl"
    config = hf.read_config(golden.ROOT / family / "base")
    return config if not folder.startswith("tied") else _tied(config)


def _tied(config):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_word_embeddings=True))


def assert_equal(found, expected):
    assert found.low_rank.keys() == expected.low_rank.keys()
    for target, one in expected.low_rank.items():
        other = found.low_rank[target]
        assert (other.scale, other.alpha) == pytest.approx((one.scale, one.alpha), rel=1e-12)
        for name in ("a", "b", "magnitude", "bias"):
            ours, theirs = getattr(other, name), getattr(one, name)
            assert (ours is None) == (theirs is None), (target, name)
            if theirs is not None:
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
    assert found.parameters.keys() == expected.parameters.keys()
    for target, value in expected.parameters.items():
        np.testing.assert_array_equal(found.parameters[target], value)
    assert found.token_rows.keys() == expected.token_rows.keys()
    for path, rows in expected.token_rows.items():
        np.testing.assert_array_equal(found.token_rows[path].token_ids, rows.token_ids)
        np.testing.assert_array_equal(found.token_rows[path].rows, rows.rows)


def changed(tmp_path, folder, *, settings=None, drop=(), add=None):
    """A copy of a golden folder with other settings, without some tensors, and with others."""
    target = tmp_path / "adapter"
    shutil.copytree(golden.ROOT / folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(settings or {})}))
    tensors = load_file(target / TENSORS)
    tensors = {key: v for key, v in tensors.items() if not any(part in key for part in drop)} | (add or {})
    save_file(tensors, target / TENSORS, metadata={"format": "pt"})
    return target


def test_the_old_layout_is_the_new_one_under_other_names():
    config = model_config("qwen2_5_vl")
    found = read_peft(golden.ROOT / "qwen2_5_vl/old_layout/dora", config)
    assert_equal(found, read_peft(golden.ROOT / "qwen2_5_vl/dora", config))


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("layout", ["new", "old"])
def test_what_is_written_is_read_again_to_the_byte(tmp_path, folder, layout):
    config = model_config(folder)
    weights = read_peft(golden.ROOT / folder, config)
    write_peft(weights, config, tmp_path, layout=layout, base_name="org/base")
    assert_equal(read_peft(tmp_path, config), weights)
    if layout == ("old" if "old_layout" in folder else "new"):
        theirs = load_file(golden.ROOT / folder / TENSORS)
        theirs = {key: v for key, v in theirs.items() if ".base_layer." not in key}
        ours = load_file(tmp_path / TENSORS)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].shape == value.shape
            assert ours[key].tobytes() == value.tobytes()


def test_the_written_configuration_has_the_keys_of_peft_0_15_and_its_values(tmp_path):
    theirs = json.loads((golden.ROOT / "qwen2_5_vl/old_layout/dora/adapter_config.json").read_text())
    config = model_config("qwen2_5_vl")
    write_peft(read_peft(golden.ROOT / "qwen2_5_vl/old_layout/dora", config), config, tmp_path, base_name="org/base")
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours.keys() == theirs.keys() | {"peft_version"}
    write_peft(read_peft(tmp_path, config), config, tmp_path / "old", layout="old")
    assert json.loads((tmp_path / "old/adapter_config.json").read_text()).keys() == theirs.keys()
    different = {key for key in theirs if ours[key] != theirs[key]}
    # "2" would name the third layer of a stack as well
    assert different == {"base_model_name_or_path", "target_modules"}
    assert ours["target_modules"] == sorted({*theirs["target_modules"], "mlp.2"} - {"2"})


def test_ranks_and_alphas_of_single_modules_become_patterns(tmp_path):
    config = model_config("qwen2_5_vl")
    write_peft(read_peft(golden.ROOT / "qwen2_5_vl/rslora", config), config, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}
    assert settings["alpha_pattern"] == {r"mlp\.0": 3, "up_proj": 16}
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (4, 8, True)


def test_targets_of_one_tower_do_not_reach_into_another(tmp_path):
    config = model_config("idefics2")
    weights = read_peft(golden.ROOT / "idefics2/lora", config)
    text = {target: low for target, low in weights.low_rank.items() if target.path.startswith("decoder.")}
    write_peft(AdapterWeights(weights.config, text), config, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [peft_modules.renamed(config, "new", name) for name in peft_modules.modules(config)]
    hit = {n for n in names if any(f".{n}".endswith(f".{target}") for target in settings["target_modules"])}
    assert hit == {n for n in names if n.startswith("model.text_model.layers.") and n.endswith("_proj")}
    assert_equal(read_peft(tmp_path, config), AdapterWeights(weights.config, text))


@pytest.mark.parametrize(
    ("preset", "targets"),
    [
        ("qwen2_5_vl_7b", "attn.proj down_proj gate_proj k_proj mlp.0 mlp.2 o_proj q_proj qkv up_proj v_proj"),
        ("idefics2_8b", "down_proj fc1 fc2 gate_proj k_proj o_proj out_proj q_proj up_proj v_proj"),
    ],
)
def test_all_linear_maps_of_a_released_model_get_the_names_that_peft_writes(preset, targets):
    modules = peft_modules.modules(families.preset(preset))
    linear = {n for n, m in modules.items() if m.kind == "linear" and not peft_modules.is_head(m)}
    assert len(linear) == {"qwen2_5_vl_7b": 358, "idefics2_8b": 410}[preset]
    others = (modules.keys() | peft_modules.containers(set(modules))) - linear
    assert peft_modules.shortest_suffixes(linear, others) == targets.split()


def test_bfloat16_is_read_and_written_as_it_is(tmp_path):
    config = model_config("qwen2_5_vl")
    weights = read_peft(golden.ROOT / "qwen2_5_vl/lora", config)
    write_peft(weights, config, tmp_path, dtype="bfloat16")
    again = read_peft(tmp_path, config)
    for target, one in weights.low_rank.items():
        assert again.low_rank[target].a.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(again.low_rank[target].a, one.a.astype(ml_dtypes.bfloat16))
    write_peft(again, config, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


def test_saved_modules_biases_and_rows_of_tokens_come_back(tmp_path):
    """The perceiver is saved by its own name, for its latents are no module."""
    config, model = model_config("idefics2"), golden.base("idefics2")
    rng = np.random.default_rng(0)
    shapes = {path: v.get_value().shape for path, v in vlm.parameters(model).items()}
    whole = {}
    for path, shape in shapes.items():
        if path.startswith("connector.") and "projection" not in path:
            layers = [(i,) for i in range(shape[0])] if ".layer." in path else [()]
            for index in layers:
                size = shape[len(index) :]
                whole[Target(path, index)] = rng.standard_normal(size).astype(np.float32)
        elif path == "encoder.blocks.layer.attention.q.bias":
            whole |= {Target(path, (i,)): rng.standard_normal(shape[1:]).astype(np.float32) for i in range(shape[0])}
    low = LowRank(np.ones((32, 2), np.float32), np.ones((2, 32), np.float32), 1.0, 2.0)
    rows = TokenRows(np.array([5, 95]), rng.standard_normal((2, 32)).astype(np.float32))
    given = AdapterWeights(
        AdapterConfig(rank=2, alpha=2.0, bias="lora_only"),
        {Target("encoder.blocks.layer.attention.q.kernel", (i,)): low for i in range(2)},
        whole,
        {EMBEDDING: rows, HEAD: rows},
    )
    write_peft(given, config, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["perceiver_resampler"]
    assert settings["trainable_token_indices"] == {"embed_tokens": [5, 95], "lm_head": [5, 95]}
    keys = load_file(tmp_path / TENSORS).keys()
    assert "base_model.model.model.vision_model.encoder.layers.1.self_attn.q_proj.base_layer.bias" in keys
    assert "base_model.model.model.connector.perceiver_resampler.latents" in keys
    assert "base_model.model.lm_head.token_adapter.trainable_tokens_delta" in keys
    assert_equal(read_peft(tmp_path, config), given)


@pytest.mark.parametrize(
    ("settings", "drop", "add", "named"),
    [
        ({}, ["layers.1.mlp.up_proj"], {}, ["target without tensors: model.language_model.layers.1.mlp.up_proj"]),
        ({"target_modules": ["q_proj"]}, [], {}, ["tensors without a target", "attn.qkv.lora_A", "mlp.2.lora_B"]),
        (
            {},
            ["layers.0.self_attn.q_proj.lora_B"],
            {},
            ["missing: model.language_model.layers.0.self_attn.q_proj.lora_B (32, 4)"],
        ),
        ({"r": 8}, [], {}, ["wrong shape", "is (4, 32), expected (8, 32)"]),
        ({"use_dora": True}, [], {}, ["lora_magnitude_vector (32,)"]),
        ({"modules_to_save": ["ln_q"]}, [], {}, ["saved module without a tensor: model.visual.merger.ln_q.weight"]),
        ({"trainable_token_indices": [3]}, [], {}, ["target without tensors", "trainable_tokens_delta"]),
        (
            {},
            [],
            {"base_model.model.vision_tower.q_proj.lora_A.weight": np.zeros((4, 32), np.float32)},
            ["the model has no such module: base_model.model.vision_tower.q_proj.lora_A.weight"],
        ),
        (
            {},
            [],
            {"base_model.model.model.visual.merger.ln_q.weight": np.zeros(32, np.float32)},
            ["tensors without a target: base_model.model.model.visual.merger.ln_q.weight"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_all_of_it_listed(tmp_path, settings, drop, add, named):
    folder = changed(tmp_path, "qwen2_5_vl/lora", settings=settings, drop=drop, add=add)
    with pytest.raises(WeightError) as error:
        read_peft(folder, model_config("qwen2_5_vl"))
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_qalora": True, "layer_replication": [[0, 1]]}, r"layer_replication = .*, use_qalora = True"),
        ({"feature_of_tomorrow": 3}, "feature_of_tomorrow = 3"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*path_initial_model"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"r": "8"}, "'8' is not a whole number"),
        ({"r": 0}, "r is 0"),
        ({"bias": "some"}, "bias 'some'"),
        ({"use_dora": True, "lora_bias": True}, "exclude each other"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(tmp_path, settings, named):
    folder = changed(tmp_path, "qwen2_5_vl/lora", settings=settings)
    with pytest.raises(UserError, match=f"adapter_config.json.*{named}"):
        read_peft(folder, model_config("qwen2_5_vl"))


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": r".*(visual|language_model).*\.(qkv|proj|[a-z]+_proj|0|2)",
            "exclude_modules": r".*patch_embed.*",
        },
        {"target_modules": "all-linear"},
        {
            "target_modules": [
                "qkv",
                "proj",
                "up_proj",
                "down_proj",
                "gate_proj",
                "k_proj",
                "q_proj",
                "v_proj",
                "o_proj",
                "mlp.0",
                "mlp.2",
            ],
            "exclude_modules": ["patch_embed.proj"],
        },
    ],
)
def test_targets_are_matched_as_peft_matches_them(tmp_path, settings):
    config = model_config("qwen2_5_vl")
    folder = changed(tmp_path, "qwen2_5_vl/lora", settings=settings)
    assert_equal(read_peft(folder, config), read_peft(golden.ROOT / "qwen2_5_vl/lora", config))


def test_layers_to_transform_count_in_every_tower(tmp_path):
    config = model_config("qwen2_5_vl")
    folder = changed(
        tmp_path,
        "qwen2_5_vl/lora",
        settings={"layers_to_transform": [1], "target_modules": ["q_proj", "qkv"]},
        drop=["layers.0", "blocks.0", "mlp", "attn.proj", "k_proj", "v_proj", "o_proj"],
    )
    found = read_peft(folder, config)
    assert {(t.path.partition(".")[0], t.index) for t in found.low_rank} == {("encoder", (1,)), ("decoder", (1,))}


def test_an_adapter_in_a_sub_folder_is_found_and_one_of_several_must_be_named(tmp_path):
    shutil.copytree(golden.ROOT / "qwen2_5_vl/lora", tmp_path / "first")
    assert find_folder(tmp_path) == tmp_path / "first"
    shutil.copytree(golden.ROOT / "qwen2_5_vl/dora", tmp_path / "second")
    with pytest.raises(UserError, match="first, second"):
        find_folder(tmp_path)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        find_folder(tmp_path / "nothing")


def test_what_peft_cannot_hold_is_refused_when_writing(tmp_path):
    config = model_config("qwen2_5_vl")
    weights = read_peft(golden.ROOT / "qwen2_5_vl/dora", config)
    target = next(iter(weights.low_rank))
    mixed = {**weights.low_rank, target: dataclasses.replace(weights.low_rank[target], magnitude=None)}
    bias = LowRank(np.ones((32, 2), np.float32), np.ones((2, 32), np.float32), 1.0, 2.0, bias=np.ones(32, np.float32))
    for low_rank, whole, named in [
        (mixed, {}, "no magnitude"),
        ({Target("decoder.blocks.layer.attention.out.kernel", (0,)): bias}, {}, "none in the base"),
        ({Target("decoder.norm.scale"): bias}, {}, "no module for decoder.norm.scale"),
        ({}, {Target("connector.out.kernel"): np.zeros((128, 32), np.float32)}, r"mlp\.2\.bias is not saved"),
    ]:
        with pytest.raises(UserError, match=named):
            write_peft(AdapterWeights(weights.config, low_rank, whole), config, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_card_names_a_base_on_the_hub_and_never_a_folder(tmp_path):
    config = model_config("qwen2_5_vl")
    weights = read_peft(golden.ROOT / "qwen2_5_vl/dora", config)
    write_peft(weights, config, tmp_path / "hub", base_name="org/base")
    card = (tmp_path / "hub" / peft_card.FILE).read_text()
    theirs = "base_model:adapter:org/base"
    assert card.startswith('---\nbase_model: "org/base"\n')
    assert theirs in card
    assert "library_name: peft" in card
    assert "| vllm | refused: DoRA" in card
    write_peft(weights, config, tmp_path / "local", base_name=str(tmp_path))
    assert str(tmp_path) not in (tmp_path / "local" / peft_card.FILE).read_text()
    assert json.loads((tmp_path / "local/adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path)
