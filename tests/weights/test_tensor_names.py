"""Names of tensors as training wrappers leave them, and a single file beside shards."""

import json

import numpy as np
import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.weights.table import WeightError
from tests import support


@pytest.fixture(scope="module")
def tensors(tiny):
    return support.random_tensors(support.tensor_shapes(tiny.config))


@pytest.fixture
def make(tiny, tokenizer_folder, tmp_path):
    """Writes the tiny checkpoint with the tensors given."""

    def write(tensors, shards=1):
        support.write_folder(tmp_path, tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
        support.write_tensors(tmp_path, tensors, shards)
        return tmp_path

    return write


def _parameters(model):
    return {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}


WRAPPED = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of DistributedDataParallel": lambda name: f"_orig_mod.module.{name}",
    "a merged PEFT model": lambda name: f"base_model.model.{name}",
    "PEFT within DistributedDataParallel": lambda name: f"module.base_model.model.{name}",
    "FSDP, layer by layer": lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "activation checkpointing": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "the newer layout, compiled": lambda name: f"_orig_mod.{support.new_layout(name)}",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_a_known_wrapper_put_into_names_is_left_out(make, tensors, tiny, capsys, kind):
    model, _ = jvlm.load(make({WRAPPED[kind](name): value for name, value in tensors.items()}))
    expected = _parameters(tiny.model)
    for path, value in _parameters(model).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert "without what a wrapper put into them" in capsys.readouterr().err


def test_a_tensor_that_a_wrapped_checkpoint_lacks_is_the_one_line_of_its_error(make, tensors):
    wrapped = {f"module.{name}": value for name, value in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(WeightError, match=r"1 problems\):\n  missing: model\.norm\.weight \(64,\)$"):
        jvlm.load(make(wrapped))


REFUSED = {
    "an unknown prefix": (lambda name: f"student.net.{name}", r"begin with 'student\.net\.'.*becomes"),
    "model. before the released names": (lambda name: f"model.{name}", r"begin with 'model\.'.*becomes"),
    "model. before the newer names": (lambda name: f"model.{support.new_layout(name)}", r"begin with 'model\.'"),
    "names of another model": (lambda name: f"layer{hash(name)}", "holds none of the .* tensors of this model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_names_with_another_beginning_are_refused_in_one_line_that_says_which(make, tensors, kind):
    rename, says = REFUSED[kind]
    with pytest.raises(WeightError, match=says) as caught:
        jvlm.load(make({rename(name): value for name, value in tensors.items()}))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("suffix", ["lora_A.default.weight", "base_layer.weight", "lora_B.weight"])
def test_the_weights_of_an_adapter_are_named_as_such(make, tensors, suffix):
    parts = {f"base_model.model.{n.removesuffix('weight')}{suffix}": v for n, v in tensors.items() if "q_proj.w" in n}
    with pytest.raises(WeightError, match=r"holds 2 tensors of an adapter .*merge") as caught:
        jvlm.load(make(parts))
    assert str(caught.value).count("\n") == 0


QUANTISED = {
    "AWQ and GPTQ": lambda n: n.replace("proj.weight", "proj.qweight"),
    "compressed-tensors": lambda n: n.replace("proj.weight", "proj.weight_packed"),
    "bitsandbytes": lambda n: n.replace("proj.bias", "proj.weight.absmax"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_named_as_such_in_one_line(make, tensors, kind):
    with pytest.raises(WeightError, match=r"holds quantised weights \(.* more tensors") as caught:
        jvlm.load(make({QUANTISED[kind](name): value for name, value in tensors.items()}))
    assert str(caught.value).count("\n") == 0


def test_shards_without_an_index_must_all_be_there(make, tensors):
    folder = make(tensors, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    jvlm.load(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match=r"lacks 1 of 3 shards: model-00002-of-00003\.safetensors"):
        jvlm.load(folder)


def test_a_folder_of_another_format_says_which_file_it_has(make, tensors):
    folder = make(tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"no \*\.safetensors in .*; pytorch_model\.bin is not read"):
        jvlm.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_said_to_be_one(make, tensors, name):
    folder = make(tensors)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (folder / name).write_text(pointer)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS"):
        jvlm.load(folder)


def test_a_single_file_beside_an_older_index_is_the_one_that_is_read_as_in_transformers(make, tensors, capsys):
    from transformers import AutoModelForImageTextToText

    folder = make({name: value + 1 for name, value in tensors.items()}, shards=2)
    support.write_tensors(folder, tensors)
    theirs = AutoModelForImageTextToText.from_pretrained(str(folder), dtype="float32").get_input_embeddings().weight
    found = _parameters(jvlm.load(folder)[0])["decoder.embedding"]
    np.testing.assert_array_equal(found, theirs.detach().numpy())
    np.testing.assert_array_equal(found, tensors["model.embed_tokens.weight"])
    assert "model.safetensors is read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_one_error_that_names_it(make, tensors, text):
    folder = make(tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json") as caught:
        jvlm.load(folder)
    assert "\n" not in str(caught.value)


def test_a_sound_index_still_says_where_each_tensor_is(make, tensors):
    folder = make(tensors, shards=3)
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) == 3
    jvlm.load(folder)
