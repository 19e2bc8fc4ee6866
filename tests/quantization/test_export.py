"""Rounding to 4 and 8 bits, and the folders that are written: errors, values, and what readers would see."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import jvlm
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.quantization import rounding
from jvlm.quantization.calibration import RoundingConfig
from jvlm.quantization.export import export_quantized
from tests import support
from tests.quantization.support import text_batch

INT4 = {"bits": 4, "group": 128, "dtype": "float32"}


@pytest.fixture(scope="module")
def correlated():
    """A matrix, inputs that depend on one another and are not equally large, and others of the same kind."""
    rng = np.random.default_rng(0)
    mixing, size = rng.standard_normal((128, 512)) / 8, np.exp(0.8 * rng.standard_normal(512))

    def inputs():
        return ((rng.standard_normal((2048, 128)) @ mixing + 0.3 * rng.standard_normal((2048, 512))) * size).astype(
            np.float32
        )

    return rng.standard_normal((128, 512)).astype(np.float32), inputs(), inputs()


def _error(weight, found, x):
    return np.linalg.norm(x @ (found - weight).T) / np.linalg.norm(x @ weight.T)


def test_gptq_and_awq_lose_less_than_rounding_to_nearest_on_inputs_that_they_have_not_seen(correlated):
    weight, seen, unseen = correlated
    gram = seen.T @ seen
    nearest = rounding.to_nearest(weight, **INT4).values()
    scale = rounding.awq_scale([weight], gram, np.abs(seen).mean(0), **INT4)
    awq = rounding.to_nearest(weight * scale, **INT4).values() / scale
    gptq = rounding.gptq(weight, gram, **INT4).values()
    errors = [_error(weight, found, unseen) for found in (nearest, awq, gptq)]
    assert 0.1 < errors[0] < 0.12  # as compressed-tensors' rounding of normally distributed weights
    assert errors[1] < 0.93 * errors[0]
    assert errors[2] < 0.6 * errors[0]
    for found in (nearest, awq, gptq):
        assert rounding.output_error(weight, found, gram) == pytest.approx(_error(weight, found, seen), rel=1e-3)


def test_gptq_is_the_plain_algorithm_whatever_its_blocks(correlated):
    """Input by input, each error spread over all inputs after it (Frantar and others, algorithm 1, without blocks)."""
    weight, seen, _ = correlated
    gram = (seen.T @ seen).astype(np.float64)
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(512)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, codes = weight.astype(np.float64), np.zeros(weight.shape)
    for at in range(512):
        if at % 128 == 0:
            scale = np.abs(left[:, at : at + 128]).max(1) / 7.5
        codes[:, at] = np.clip(np.rint(left[:, at] / scale), -8, 7)
        left[:, at:] -= np.outer((left[:, at] - codes[:, at] * scale) / upper[at, at], upper[at, at:])
    for block in (48, 128, 512):
        found = rounding.gptq(weight, seen.T @ seen, **INT4, block=block)
        assert (found.codes != codes).mean() < 0.01, block


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = support.make_tokenizer(folder / "tokenizer")
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    config = support.tiny_config(
        support.token_ids(tokenizer), vocab_size=size, intermediate_size=128, num_key_value_heads=4
    )
    (folder / "base").mkdir()
    support.write_folder(folder / "base", tokenizer, config, limits=(4 * 784, 64 * 784))
    support.write_tensors(folder / "base", support.random_tensors(support.tensor_shapes(config)))
    return jvlm.load(folder / "base")


def _examples(model):
    batches = [text_batch(model, rows=4, tokens=64, seed=seed) for seed in range(2)]
    return [dataclasses.replace(batch, tokens=batch.tokens % 300) for batch in batches]


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    options = {"fp8": {}, "rtn": {"dtype": "bfloat16", "layout": "transformers"}, "gptq": {}, "awq": {}}
    found = {}
    for method, how in options.items():
        config = RoundingConfig(method, group_size=32)
        found[method] = export_quantized(*model, folder / method, config, examples=_examples(model[0]), **how)
    return folder, found


def test_folders_read_back_are_what_was_rounded(model, exported):
    folder, found = exported
    batch = _examples(model[0])[0]
    expected = np.asarray(model[0](batch))
    for method, rounded in found.items():
        read = jvlm.load(folder / method)[0]
        values = vlm.parameters(read)
        assert len(rounded.matrices) == 2 * 7
        for (path, layer), matrix in rounded.matrices.items():
            np.testing.assert_array_equal(np.asarray(values[path].get_value()[layer]).T, matrix.values())
        difference = np.abs(np.asarray(read(batch)) - expected).mean() / np.abs(expected).mean()
        assert 0.002 < difference < 0.3, (method, difference)
    errors = {method: np.mean(list(rounded.errors.values())) for method, rounded in found.items()}
    assert errors["fp8"] < errors["gptq"] < errors["awq"] < errors["rtn"]
    assert "mlp.down" in found["gptq"].report()
    assert "outputs over the examples" in found["gptq"].report()


def test_config_json_says_what_readers_need(exported):
    folder, _ = exported
    settings = json.loads((folder / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "float-quantized"
    assert settings["ignore"] == ["lm_head", "re:.*visual.*"]
    assert settings["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    settings = json.loads((folder / "gptq" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 32
    tensors = load_file(folder / "gptq" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj."
    assert tensors[f"{name}weight_packed"].dtype == np.int32
    assert tensors[f"{name}weight_packed"].shape == (64, 16)
    assert tensors[f"{name}weight_scale"].shape == (64, 4)
    np.testing.assert_array_equal(tensors[f"{name}weight_shape"], [64, 128])


def test_what_cannot_be_exported_is_refused(model, exported, tmp_path):
    with pytest.raises(UserError, match="gptq needs examples to calibrate on"):
        export_quantized(*model, tmp_path / "a", RoundingConfig("gptq", group_size=32))
    with pytest.raises(UserError, match=r"decoder.blocks.layer.attention.k has 64 inputs, which groups of 128 do not"):
        export_quantized(*model, tmp_path / "b", RoundingConfig("rtn"))
    with pytest.raises(UserError, match="is not empty"):
        export_quantized(*model, exported[0] / "rtn", RoundingConfig("rtn", group_size=32))
