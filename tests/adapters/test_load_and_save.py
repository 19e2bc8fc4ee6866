"""`jvlm.load` and `jvlm.save` of models with adapters: folders that name their base, merged folders, PEFT folders."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jvlm
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.merge import merge
from jvlm.adapters.merge_folder import merge_folder
from jvlm.adapters.peft_load import refuse_as_start
from jvlm.errors import UserError
from jvlm.inference.merged_answers import different_answers
from jvlm.models import vlm
from jvlm.quantization.config import QuantizationConfig
from tests import support

EXAMPLE = {
    "messages": [{"role": "user", "content": "<image>what is the cat?"}, {"role": "assistant", "content": "a cat"}],
    "images": [support.picture(98, 70)],
}


@pytest.fixture(scope="module")
def adapted(tiny):
    """The tiny Qwen2.5-VL with a LoRA that is not zero any more."""
    model, processor = jvlm.load(tiny.folder)
    model = attach(model, AdapterConfig(rank=4, alpha=8.0), seed=1)
    weights = extract(model)
    rng = np.random.default_rng(0)
    trained = {
        target: dataclasses.replace(low, b=rng.standard_normal(low.b.shape).astype(np.float32) / 10)
        for target, low in weights.low_rank.items()
    }
    return attach(jvlm.load(tiny.folder)[0], dataclasses.replace(weights, low_rank=trained)), processor


@pytest.fixture(scope="module")
def folder(adapted, tiny, tmp_path_factory):
    """Its PEFT folder, which names the base."""
    folder = tmp_path_factory.mktemp("peft")
    jvlm.save(*adapted, folder, format="peft", base=str(tiny.folder))
    return folder


def assert_same_adapter(model, other):
    ours, theirs = extract(model), extract(other)
    assert ours.low_rank.keys() == theirs.low_rank.keys()
    for target, low in theirs.low_rank.items():
        np.testing.assert_array_equal(ours.low_rank[target].a, low.a)
        np.testing.assert_array_equal(ours.low_rank[target].b, low.b)
        assert ours.low_rank[target].scale == low.scale


def test_a_peft_folder_loads_with_the_base_that_it_names_or_that_is_given(adapted, folder, tiny, tmp_path):
    assert_same_adapter(jvlm.load(folder)[0], adapted[0])
    path = tmp_path / "adapter_config.json"
    values = json.loads((folder / path.name).read_text())
    path.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    (tmp_path / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
    assert_same_adapter(jvlm.load(tiny.folder, adapter=tmp_path)[0], adapted[0])
    with pytest.raises(UserError, match="does not name its base"):
        jvlm.load(tmp_path)
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        jvlm.load(tmp_path)


def test_a_model_with_adapters_is_saved_merged_and_stays_as_it_was(adapted, tiny, tmp_path):
    jvlm.save(*adapted, tmp_path / "hf")
    merged, _ = jvlm.load(tmp_path / "hf")
    assert merged.adapters is None
    changed = {target.path for target in extract(adapted[0]).low_rank}
    values = [vlm.parameters(model) for model in (merged, merge(adapted[0]), jvlm.load(tiny.folder)[0], adapted[0])]
    assert all(v.keys() == values[0].keys() for v in values)
    for path in values[0]:
        saved, expected, base, after = (np.asarray(v[path].get_value()) for v in values)
        np.testing.assert_array_equal(saved, expected)
        np.testing.assert_array_equal(after, base)
        assert np.array_equal(saved, base) == (path not in changed)


@pytest.mark.slow
def test_merged_answers_are_compared_with_the_adapters(folder, tiny, tmp_path):
    conversations = [EXAMPLE, {"messages": [{"role": "user", "content": "what is it?"}]}]
    merge_folder(tiny.folder, folder, tmp_path / "merged")
    assert different_answers(tiny.folder, folder, tmp_path / "merged", conversations, max_new_tokens=6) == []
    found = different_answers(tiny.folder, folder, tiny.folder, conversations, max_new_tokens=6)
    assert [one.number for one in found] == [0, 1]
    assert all(one.adapter != one.merged for one in found)


def test_saving_refuses_options_that_a_format_does_not_take(adapted, tiny, tmp_path):
    for options, named in [
        ({"format": "hf", "base": "org/base"}, "leave out base"),
        ({"format": "peft", "layout": "transformers"}, "layouts of its own"),
        ({"format": "onnx"}, "supported: 'hf', 'jvlm', 'peft'"),
    ]:
        with pytest.raises(UserError, match=named):
            jvlm.save(*adapted, tmp_path / "x", **options)
    with pytest.raises(UserError, match="no adapters"):
        jvlm.save(*jvlm.load(tiny.folder), tmp_path / "x", format="peft")


def test_a_quantised_base_is_not_merged_into(folder, tiny):
    quantize = QuantizationConfig("int8")
    model, _ = jvlm.load(tiny.folder, adapter=folder, quantize=quantize)
    with pytest.raises(UserError, match="quantised"):
        merge(model)


def test_an_adapter_is_no_model_to_start_from(folder, tiny):
    with pytest.raises(UserError, match=r"init_from and the adapter as adapters_from.*merge.*resume"):
        refuse_as_start(folder)
    refuse_as_start(tiny.folder)


def test_parameters_are_merged_on_their_devices(adapted, folder, tiny):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model, _ = jvlm.load(tiny.folder, adapter=folder, sharding=lambda path, variable: sharding)
    kernel = merge(model).decoder.blocks.layer.attention.q.kernel.get_value()
    assert kernel.sharding == sharding
