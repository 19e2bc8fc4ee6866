"""Hugging Face folders in every published form come in, go out byte for byte, and load in transformers."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import jvlm
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.weights import hf
from tests import support

ROW = {
    "messages": [
        {"role": "user", "content": "<image>what is in <image> it?"},
        {"role": "assistant", "content": "a red circle"},
    ],
    "images": [support.picture(140, 84), support.picture(56, 112, 1)],
}
SHAPE = {"seq_len": 128, "max_patches": 128}


@pytest.fixture(scope="module")
def tensors(tiny):
    """Name -> float32 array of the tiny checkpoint."""
    return support.random_tensors(support.tensor_shapes(tiny.config))


@pytest.fixture(scope="module")
def make(tiny, tokenizer_folder, tmp_path_factory):
    """Writes a folder from tensors and configuration values."""

    def write(tensors, *, shards=1, **changes):
        folder = tmp_path_factory.mktemp("checkpoint")
        config = {**tiny.config, **changes}
        support.write_folder(folder, tokenizer_folder, config, limits=(4 * 784, 64 * 784))
        support.write_tensors(folder, tensors, shards)
        return folder

    return write


def cast(tensors, kind):
    """The tensors stored as in published checkpoints: one dtype, or several mixed."""
    halves = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

    def target(name):
        if kind == "bf16 text, fp32 vision":
            return np.float32 if name.startswith("visual.") else ml_dtypes.bfloat16
        if kind == "mixed within a stack":
            return ml_dtypes.bfloat16 if ".0." in name else np.float32
        return halves[kind]

    return {name: value.astype(target(name)) for name, value in tensors.items()}


KINDS = ["float32", "bfloat16", "float16", "bf16 text, fp32 vision", "mixed within a stack"]


def logits_of(folder):
    """jvlm's logits for ROW, without padding."""
    model, processor = jvlm.load(folder)
    batch = processor.pack([ROW], **SHAPE)
    return np.asarray(model(batch))[0, : int(batch.segment_ids.sum())]


def torch_logits(folder, tiny):
    model = support.torch_model(folder)
    with torch.no_grad():
        return model(**support.hf_inputs(tiny, ROW)).logits.numpy()[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_round_trip_is_byte_identical_for_every_dtype(make, tensors, tmp_path, kind, shards):
    folder = make(cast(tensors, kind), shards=shards)
    jvlm.save(*jvlm.load(folder), tmp_path, max_shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert support.raw_tensors(tmp_path) == support.raw_tensors(folder)


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_a_round_trip_is_byte_identical_in_both_layouts(make, tensors, tmp_path, layout):
    new = {support.new_layout(n): v for n, v in tensors.items()}
    folder = make(new if layout == "transformers" else tensors)
    jvlm.save(*jvlm.load(folder), tmp_path, layout=layout)
    assert support.raw_tensors(tmp_path) == support.raw_tensors(folder)


def test_a_round_trip_of_a_tied_model_writes_no_head(tiny_tied, tmp_path):
    jvlm.save(tiny_tied.model, tiny_tied.processor, tmp_path)
    assert support.raw_tensors(tmp_path) == support.raw_tensors(tiny_tied.folder)
    assert "lm_head.weight" not in support.raw_tensors(tmp_path)


def test_a_stored_copy_of_the_embedding_as_head_of_a_tied_model_is_harmless(make, tensors, tiny):
    copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = make(copied, tie_word_embeddings=True)
    np.testing.assert_allclose(logits_of(folder), torch_logits(folder, tiny), atol=1e-4)


def test_a_head_that_contradicts_the_tie_is_refused(make, tensors):
    # transformers 4 would drop the head, transformers 5 drops the tie
    with pytest.raises(jvlm.weights.table.WeightError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        jvlm.load(make(tensors, tie_word_embeddings=True))


@pytest.mark.parametrize("kind", ["bfloat16", "bf16 text, fp32 vision"])
def test_logits_from_low_precision_storage_equal_transformers(make, tensors, tiny, kind):
    folder = make(cast(tensors, kind), shards=2)
    np.testing.assert_allclose(logits_of(folder), torch_logits(folder, tiny), atol=1e-4)


def test_the_newer_layout_gives_the_same_logits(make, tensors, tiny):
    folder = make({support.new_layout(n): v for n, v in tensors.items()}, shards=2)
    np.testing.assert_allclose(logits_of(folder), torch_logits(folder, tiny), atol=1e-4)


def test_a_folder_saved_by_transformers_loads(tiny, tokenizer_folder, tmp_path):
    support.write_folder(tmp_path, tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    tiny.torch_model.save_pretrained(str(tmp_path))
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    np.testing.assert_allclose(logits_of(tmp_path), torch_logits(tiny.folder, tiny), atol=1e-4)


@pytest.fixture(scope="module", params=["released", "transformers"])
def exported(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    jvlm.save(tiny.model, tiny.processor, folder, layout=request.param, max_shard_bytes=300_000)
    return folder


def test_an_export_loads_in_transformers_and_gives_the_same_logits(exported, tiny):
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        str(exported), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = model(**support.hf_inputs(tiny, ROW)).logits.numpy()[0]
    batch = tiny.processor.pack([ROW], **SHAPE)
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, : len(theirs)], theirs, atol=1e-4)


def test_an_export_of_a_model_trained_from_nothing_has_a_config_that_transformers_reads(tiny, tmp_path):
    from transformers import AutoConfig

    model, processor = jvlm.load(tiny.folder, precision=Precision(initializer_range=None))
    jvlm.save(model, processor, tmp_path)
    text = AutoConfig.from_pretrained(str(tmp_path)).text_config
    assert (text.hidden_size, text.num_hidden_layers, text.rope_parameters["rope_theta"]) == (64, 2, 1e6)


def test_the_tokenizer_of_an_export_is_the_same_in_transformers(exported, tiny):
    from transformers import AutoTokenizer

    original, written = (AutoTokenizer.from_pretrained(str(f)) for f in (tiny.folder, exported))
    messages = support.chat_messages(ROW)
    assert written.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    text = "the cat <|im_end|>\n<|vision_start|>é 640 x 480"
    assert written(text)["input_ids"] == original(text)["input_ids"]
    assert (written.eos_token_id, written.pad_token_id) == (original.eos_token_id, original.pad_token_id)


def test_the_image_processor_of_an_export_is_the_same_in_transformers(exported, tiny):
    original, written = (support.image_processor(f)(ROW["images"]) for f in (tiny.folder, exported))
    np.testing.assert_array_equal(written["pixel_values"], original["pixel_values"])
    np.testing.assert_array_equal(written["image_grid_thw"], original["image_grid_thw"])


def test_the_generation_defaults_of_an_export_are_those_of_the_source(exported, tiny):
    source = json.loads((tiny.folder / "generation_config.json").read_text())
    written = json.loads((exported / "generation_config.json").read_text())
    assert source.items() <= written.items()
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(str(exported)).temperature == source["temperature"]


def test_an_export_loads_in_jvlm_with_the_same_processor(exported, tiny):
    model, processor = jvlm.load(exported)
    assert model.config == tiny.model.config
    assert processor.config == tiny.processor.config
    np.testing.assert_array_equal(processor.pack([ROW]).tokens, tiny.processor.pack([ROW]).tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_can_change_the_dtype(tiny, tensors, tmp_path, dtype):
    jvlm.save(tiny.model, tiny.processor, tmp_path, dtype=dtype)
    for name, (found, _, data) in support.raw_tensors(tmp_path).items():
        assert found == getattr(torch, dtype), name
        assert data == torch.from_numpy(tensors[name]).to(found).view(torch.uint8).numpy().tobytes(), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype


def test_saving_over_an_older_export_leaves_no_stale_file(tiny, tmp_path):
    jvlm.save(tiny.model, tiny.processor, tmp_path, max_shard_bytes=200_000)
    jvlm.save(tiny.model, tiny.processor, tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_parameters_are_stored_in_the_dtype_of_precision(tiny):
    model, _ = jvlm.load(tiny.folder, precision=Precision(param_dtype="bfloat16"))
    assert {v.get_value().dtype for v in vlm.parameters(model).values()} == {jnp.dtype("bfloat16")}


def test_an_old_config_is_filled_with_the_published_values(tmp_path):
    values = support.tiny_config(
        dict.fromkeys(support.SPECIAL_TOKENS, 7),
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )
    values["vision_config"] = {"hidden_size": 1280, "in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2}
    for key in "image_token_id video_token_id vision_start_token_id vision_end_token_id vision_token_id".split():
        del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = hf.read_config(tmp_path)
    vit = config.encoder
    assert (vit.depth, vit.intermediate_size, vit.num_heads, vit.hidden_size) == (32, 3420, 16, 1280)
    assert (vit.in_channels, vit.patch_size, vit.temporal_patch_size, vit.spatial_merge_size) == (3, 14, 2, 2)
    assert (vit.window_size, vit.fullatt_block_indexes, vit.tokens_per_second) == (112, (7, 15, 23, 31), 2)
    assert config.decoder.mrope_section == (16, 24, 24)
    ids = (config.vision_start_token_id, config.vision_end_token_id, config.vision_pad_token_id)
    assert (*ids, config.image_token_id, config.video_token_id) == (151652, 151653, 151654, 151655, 151656)


@pytest.mark.parametrize("root", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("nested", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
def test_a_tie_is_read_from_wherever_transformers_reads_it(tiny, tmp_path, root, nested):
    from transformers import Qwen2_5_VLConfig

    values = {k: v for k, v in tiny.config.items() if k != "tie_word_embeddings"}
    values = {**values, **root, "text_config": {**values, **nested, "model_type": "qwen2_5_vl_text"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = Qwen2_5_VLConfig.from_pretrained(str(tmp_path)).tie_word_embeddings
    assert hf.read_config(tmp_path).decoder.tie_word_embeddings == theirs


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llava"}, "model_type 'llava' is not supported; supported: .*qwen2_5_vl"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vision_config": {"out_hidden_size": 128}}, "out_hidden_size 128"),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_refused(make, tensors, changes, says):
    folder = make(tensors)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UserError, match=says):
        jvlm.load(folder)


def test_every_missing_extra_and_misshapen_tensor_is_in_one_error(make, tensors):
    wrong = dict(tensors)
    del wrong["visual.merger.ln_q.weight"], wrong["model.layers.1.self_attn.q_proj.bias"]
    wrong["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    wrong["score.weight"] = np.zeros((3,), np.float32)
    wrong["model.norm.weight"] = np.zeros((5,), np.float32)
    wrong["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    folder = make(wrong)
    with pytest.raises(jvlm.weights.table.WeightError) as caught:
        jvlm.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "6 problems" in message
    for line in (
        "missing: visual.merger.ln_q.weight (32,)",
        "missing: model.layers.1.self_attn.q_proj.bias (64,)",
        "unexpected: model.layers.9.mlp.up_proj.weight (2, 2)",
        "unexpected: score.weight (3,)",
        "wrong shape: model.norm.weight is (5,), expected (64,)",
        "wrong shape: lm_head.weight is (64, 352), expected (352, 64)",
    ):
        assert line in message


def test_a_tensor_under_both_spellings_is_refused(make, tensors):
    folder = make({**tensors, "model.visual.merger.ln_q.weight": tensors["visual.merger.ln_q.weight"]})
    with pytest.raises(jvlm.weights.table.WeightError, match=r"visual.merger.ln_q.weight twice"):
        jvlm.load(folder)


def test_a_truncated_file_is_named(make, tensors):
    folder = make(tensors, shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(jvlm.weights.table.WeightError, match=r"model-00002-of-00002.safetensors is not a readable"):
        jvlm.load(folder)


def test_a_file_that_the_index_names_but_is_not_there_is_named(make, tensors):
    folder = make(tensors, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(jvlm.weights.table.WeightError, match=r"not there: model-00002-of-00003.safetensors"):
        jvlm.load(folder)


def test_an_index_that_points_into_the_wrong_file_is_refused(make, tensors):
    folder = make(tensors, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = {
        "model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors",
        "model-00002-of-00002.safetensors": "model-00001-of-00002.safetensors",
    }[index["weight_map"]["model.norm.weight"]]
    path.write_text(json.dumps(index))
    with pytest.raises(jvlm.weights.table.WeightError, match=r"model.norm.weight: index says"):
        jvlm.load(folder)


def test_a_folder_of_neither_kind_and_a_missing_one_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        jvlm.load(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither config.json"):
        jvlm.load(tmp_path)


def test_a_tokenizer_that_disagrees_with_the_configuration_is_refused(make, tensors, tiny):
    folder = make(tensors, image_token_id=tiny.config["image_token_id"] + 1)
    with pytest.raises(UserError, match=r"gives <\|image_pad\|> the id 332, the model's configuration 333"):
        jvlm.load(folder)


def test_a_folder_without_weights_says_so(make, tensors):
    folder = make(tensors)
    (folder / "model.safetensors").unlink()
    with pytest.raises(jvlm.weights.table.WeightError, match=r"no \*.safetensors"):
        jvlm.load(folder)


def test_copies_of_a_folder_are_independent_of_it(make, tensors, tmp_path):
    folder = make(tensors)
    model, processor = jvlm.load(folder)
    shutil.rmtree(folder)
    jvlm.save(model, processor, tmp_path)
    assert set(support.raw_tensors(tmp_path)) == set(tensors)


def test_saving_over_its_own_source_keeps_every_byte(make, tensors):
    folder = make(cast(tensors, "bfloat16"), shards=3)
    before = support.raw_tensors(folder)
    jvlm.save(*jvlm.load(folder), folder)
    assert support.raw_tensors(folder) == before


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_model(tokenizer_folder, tmp_path):
    support.write_big_checkpoint(tmp_path, tokenizer_folder, shards=2)
    # The bound is the model and one stacked parameter (24 % of this one); two copies would be 2.
    ratio = support.run_python(
        support.MEMORY_PROBE
        + f"""
import jax, jvlm, transformers
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.weights import hf
config = hf.read_config(hf.Path({str(tmp_path)!r}), Precision())
jax.numpy.zeros(3).block_until_ready()
with Peak() as peak:
    model = hf.load_weights(hf.Path({str(tmp_path)!r}), config)
print(peak.growth / sum(v.get_value().nbytes for v in vlm.parameters(model).values()))
"""
    )
    assert 1.0 < float(ratio) < 1.35


def test_parameters_load_straight_into_their_shards(tiny):
    """Four devices in a fresh process; the values must be those of one device."""
    support.run_python(
        f"""
import jax, jvlm, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jvlm.models import vlm
mesh = Mesh(np.array(jax.devices()), ("x",))

def sharding(path, variable):
    shape = variable.get_value().shape
    axis = next((i for i in reversed(range(len(shape))) if shape[i] % 4 == 0), None)
    return NamedSharding(mesh, PartitionSpec(*[None if i != axis else "x" for i in range(len(shape))]))

whole, _ = jvlm.load({str(tiny.folder)!r})
split, _ = jvlm.load({str(tiny.folder)!r}, sharding=sharding)
expected = vlm.parameters(whole)
for path, variable in vlm.parameters(split).items():
    value = variable.get_value()
    assert len(value.devices()) == 4, path
    np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path].get_value()))
    if value.sharding.shard_shape(value.shape) != value.shape:
        assert value.addressable_shards[0].data.size * 4 == value.size, path
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
