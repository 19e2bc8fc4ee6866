"""A dtype that cannot hold a value is refused, with every tensor that has one, from every door that writes."""

import ml_dtypes
import numpy as np
import pytest

import jvlm
from jvlm import cli
from jvlm.errors import UserError
from jvlm.training.config import ExportConfig
from jvlm.weights import safetensors_files
from jvlm.weights.convert import convert
from jvlm.weights.table import WeightError
from tests import support

LARGE = {"model.norm.weight": 1e5, "model.layers.1.mlp.up_proj.weight": -7e4, "lm_head.weight": 65520.0}


@pytest.fixture
def folder(tiny, tokenizer_folder, tmp_path):
    """The tiny checkpoint with a value in each of three tensors that float16 cannot hold, and infinity beside one."""
    tensors = support.random_tensors(support.tensor_shapes(tiny.config))
    for name, value in LARGE.items():
        tensors[name].flat[3] = value
    tensors["model.norm.weight"][4] = np.inf
    support.write_folder(tmp_path / "source", tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    support.write_tensors(tmp_path / "source", tensors)
    return tmp_path / "source"


def _says_all(message):
    assert "3 tensors" in message
    for name, value in LARGE.items():
        assert f"{name} holds {abs(value):g}, and float16 ends at 65504" in message


@pytest.mark.parametrize("shard", [5 * 10**9, 100_000])
def test_saving_names_every_tensor_and_leaves_what_was_there(folder, tmp_path, shard):
    model, processor = jvlm.load(folder)
    jvlm.save(model, processor, tmp_path / "new", dtype="bfloat16", max_shard_bytes=shard)
    before = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    with pytest.raises(WeightError) as caught:
        jvlm.save(model, processor, tmp_path / "new", dtype="float16", max_shard_bytes=shard)
    _says_all(str(caught.value))
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == before


def test_converting_a_folder_or_a_run_names_every_tensor_and_leaves_no_weights(folder, tmp_path):
    jvlm.save(*jvlm.load(folder), tmp_path / "run", format="jvlm")
    for source in (folder, tmp_path / "run"):
        with pytest.raises(WeightError) as caught:
            convert(source, tmp_path / "new", dtype="float16")
        _says_all(str(caught.value))
        assert not list((tmp_path / "new").glob("*"))


def test_the_command_says_it_without_a_traceback(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), str(tmp_path / "new"), "--dtype", "float16"]) == 2
    said = capsys.readouterr().err
    _says_all(said)
    assert "Traceback" not in said


LARGEST = {"float16": 65504.0, "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), "float32": 3.4028234e38}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("factor", [1.0, 1.0001, 1.01, -1.01])
def test_values_that_round_to_the_largest_are_written_and_others_refused(tmp_path, dtype, factor):
    value = np.array([1.0, LARGEST[dtype] * factor], np.float64)
    target = np.dtype(dtype)
    tensor = ("a", target, (2,), lambda: value)
    with np.errstate(over="ignore"):
        expected = value.astype(target)
    if np.isfinite(expected.astype(np.float64)).all():
        safetensors_files.write(tmp_path, [tensor])
        with safetensors_files.Tensors(tmp_path) as tensors:
            np.testing.assert_array_equal(tensors.read("a"), expected)
    else:
        with pytest.raises(WeightError, match=f"a holds .*, and {dtype} ends at"):
            safetensors_files.write(tmp_path, [tensor])


def test_what_was_not_finite_before_is_written_as_it_is(tmp_path):
    value = np.array([np.nan, np.inf, -np.inf, 2.0], np.float32)
    safetensors_files.write(tmp_path, [("a", np.dtype(np.float16), (4,), lambda: value)])
    with safetensors_files.Tensors(tmp_path) as tensors:
        np.testing.assert_array_equal(tensors.read("a"), value.astype(np.float16))


@pytest.mark.parametrize("name", ["bf16", "int8", "float8_e4m3fn", "FP16", ""])
def test_an_unknown_dtype_is_one_message_with_the_known_ones_before_anything_is_done(tiny, tmp_path, name):
    for call in (
        lambda: jvlm.save(tiny.model, tiny.processor, tmp_path / "new", dtype=name),
        lambda: ExportConfig(dtype=name),
    ):
        with pytest.raises(UserError, match=f"unknown dtype '{name}'; known: .*float32, float16, bfloat16"):
            call()
    with pytest.raises(UserError, match=f"unknown dtype '{name}'; known: keep, float32, bfloat16, float16"):
        convert(tiny.folder, tmp_path / "new", dtype=name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layout": "old"}, "unknown layout 'old'; known: released, transformers"),
        ({"format": "gguf"}, "unknown format 'gguf'; supported: 'hf', 'jvlm'"),
        ({"format": "jvlm", "dtype": "float16"}, "leave out dtype and layout"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be positive, got 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(tiny, tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        jvlm.save(tiny.model, tiny.processor, tmp_path / "new", **settings)


def test_a_file_in_place_of_the_folder_is_named(tiny, tmp_path):
    (tmp_path / "new").write_text("")
    with pytest.raises(UserError, match="new is a file; give a folder"):
        jvlm.save(tiny.model, tiny.processor, tmp_path / "new")
