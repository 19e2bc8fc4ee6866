"""Folders with a file that is missing, cut short or garbled: one error each, which names it and says what to do."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jvlm
from jvlm import cli
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.weights import run_dir
from jvlm.weights.convert import convert
from jvlm.weights.fingerprints import Running, _sums, fingerprints, version_of
from jvlm.weights.table import WeightError
from tests import support


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    """A folder of each kind: Hugging Face in two shards, and a run."""
    root = tmp_path_factory.mktemp("sound")
    jvlm.save(tiny.model, tiny.processor, root / "hf", max_shard_bytes=500_000)
    jvlm.save(tiny.model, tiny.processor, root / "run", format="jvlm")
    return root


def _half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HOW = {
    "missing": lambda path: path.unlink(),
    "cut": _half,
    "empty": lambda path: path.write_bytes(b""),
    "garbled": lambda path: path.write_bytes(b"\x00\xff{]" * 9),
    "a list": lambda path: path.write_text("[1, 2]"),
}
FILES = {
    "hf": (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    "run": (
        "experiment.json",
        "processor/tokenizer.json",
        "processor/tokenizer_config.json",
        "processor/generation_config.json",
        "checkpoints/0/data/metadata",
        "checkpoints/0/params/_METADATA",
        "checkpoints/0/params/manifest.ocdbt",
    ),
}
# Without these a folder is another one and sound: defaults of generation; and one file of weights instead of shards.
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
CASES = [(kind, file, how) for kind, files in FILES.items() for file in files for how in HOW]


@pytest.mark.parametrize(("kind", "file", "how"), CASES)
def test_a_damaged_file_is_one_error_that_names_it(sound, tmp_path, kind, file, how):
    if how == "missing" and file.rpartition("/")[2] in OPTIONAL:
        shutil.copytree(sound / kind, tmp_path / kind)
        (tmp_path / kind / file).unlink()
        jvlm.load(tmp_path / kind)
        return
    shutil.copytree(sound / kind, tmp_path / kind)
    HOW[how](tmp_path / kind / file)
    with pytest.raises(UserError) as caught:
        jvlm.load(tmp_path / kind)
    said = str(caught.value)
    name = file if kind == "hf" else file.removesuffix("/manifest.ocdbt").removesuffix("/params")
    if how == "missing" and file in ("experiment.json", "config.json"):
        assert "has neither config.json" in said
    elif how == "missing" and "tokenizer.json" in file:
        assert f"{(tmp_path / kind / file).parent} has no tokenizer" in said
    elif how == "missing" and file.endswith(".safetensors"):
        assert f"not there: {file}" in said
    else:
        assert str(tmp_path / kind / name) in said
        assert any(word in said for word in ("copy", "Copy", "again"))
    assert said.count("\n") == 0


VALUES = {
    "a size is missing": (lambda v: v.pop("hidden_size"), "has no 'hidden_size'"),
    "a size is text": (lambda v: v.update(intermediate_size="88"), r"intermediate_size[\s\S]*'88'"),
    "a size is null": (lambda v: v.update(vocab_size=None), r"vocab_size[\s\S]*None"),
    "no heads": (lambda v: v.update(num_attention_heads=0), "value of the wrong kind"),
    "a part is a list": (lambda v: v.update(vision_config=[1]), "value of the wrong kind"),
    "no model_type": (lambda v: v.pop("model_type"), "model_type None is not supported; supported"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_is_missing_or_of_the_wrong_kind_is_named_with_its_file(sound, tmp_path, name):
    change, says = VALUES[name]
    values = json.loads((sound / "hf" / "config.json").read_text())
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightError, match=says) as caught:
        jvlm.load(tmp_path)
    if "model_type" not in name:
        assert str(tmp_path / "config.json") in str(caught.value)


RUN_VALUES = {
    "no model": (lambda v: v.pop("model"), "has no 'model'"),
    "an unknown decoder": (lambda v: v["model"]["decoder"].update(type="Mamba"), "type: 'Mamba' is unknown"),
    "an unknown field": (lambda v: v["model"].update(image_token=3), "unknown field 'model.image_token'"),
    "a wrong value": (lambda v: v["model"]["decoder"].update(hidden_size="a"), "'a' is not of type"),
}


@pytest.mark.parametrize("name", RUN_VALUES)
def test_a_value_of_a_run_that_is_wrong_is_named_with_its_file(sound, tmp_path, name):
    change, says = RUN_VALUES[name]
    values = json.loads((sound / "run" / "experiment.json").read_text())
    change(values)
    (tmp_path / "experiment.json").write_text(json.dumps(values))
    with pytest.raises(WeightError, match=says) as caught:
        jvlm.load(tmp_path)
    assert str(tmp_path / "experiment.json") in str(caught.value)


@pytest.mark.parametrize("part", ["processor", "checkpoints", "checkpoints/0/params"])
def test_a_folder_missing_in_a_run_is_named(sound, tmp_path, part):
    shutil.copytree(sound / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / part)
    with pytest.raises(WeightError, match=r"processor is missing|has no complete checkpoint") as caught:
        jvlm.load(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


def test_parameters_without_fingerprints_are_read_with_a_note(sound, tmp_path, capsys):
    shutil.copytree(sound / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0" / "data")
    jvlm.load(tmp_path / "run")
    assert "checkpoints/0 has no fingerprints: its arrays are read unchecked" in capsys.readouterr().err


def _data_files(run):
    """What holds the arrays, the largest first: one bit of each is flipped."""
    files = [p for p in (run / "checkpoints" / "0" / "params").rglob("*") if p.is_file() and "d" in p.parts[-2:]]
    return sorted(files, key=lambda p: p.stat().st_size, reverse=True)


READERS = {
    "load": jvlm.load,
    "load in another dtype": lambda run: jvlm.load(run, precision=Precision(param_dtype="bfloat16")),
    "convert": lambda run: convert(run, run.parent / "new"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("where", [0.13, 0.5, 0.91])
def test_a_flipped_bit_in_the_arrays_is_an_error_that_names_checkpoint_and_array(sound, tmp_path, reader, where):
    shutil.copytree(sound / "run", tmp_path / "run")
    file = _data_files(tmp_path / "run")[0]
    data = bytearray(file.read_bytes())
    assert len(data) > 100_000  # arrays, not an index of them; how many files they are in depends on timing
    data[int(len(data) * where)] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(WeightError, match="is damaged: ") as caught:
        READERS[reader](tmp_path / "run")
    said = str(caught.value)
    assert f"checkpoint {tmp_path / 'run' / 'checkpoints' / '0'}" in said
    assert any(path in said for path in run_dir.saved_fingerprints(tmp_path / "run" / "checkpoints" / "0"))
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("reader", READERS)
def test_an_array_file_that_is_cut_or_gone_is_named_by_its_checkpoint(sound, tmp_path, reader):
    for damage in (_half, lambda path: path.unlink()):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(sound / "run", tmp_path / "run")
        damage(_data_files(tmp_path / "run")[0])
        with pytest.raises(WeightError, match=r"checkpoints/0 is damaged: .*cannot be read") as caught:
            READERS[reader](tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_the_command_line_says_it_in_one_line(sound, tmp_path, capsys):
    shutil.copytree(sound / "run", tmp_path / "run")
    _half(_data_files(tmp_path / "run")[0])
    assert cli.main(["generate", "--model", str(tmp_path / "run"), "--prompt", "hi"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "checkpoints/0 is damaged" in said


def test_a_sound_run_loads_as_it_was_in_either_dtype_and_from_any_reader(sound, tiny, tmp_path):
    expected = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(tiny.model).items()}
    for dtype in ("float32", "bfloat16"):
        model, _ = jvlm.load(sound / "run", precision=Precision(param_dtype=dtype))
        for path, variable in vlm.parameters(model).items():
            np.testing.assert_array_equal(np.asarray(variable.get_value()), expected[path].astype(jnp.dtype(dtype)))
    convert(sound / "run", tmp_path / "new")
    assert support.raw_tensors(tmp_path / "new") == support.raw_tensors(sound / "hf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float64"])
def test_fingerprints_on_the_host_in_parts_and_on_a_device_are_one_number(dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.normal(size=(5, 7, 11)) * 9).astype(dtype)
        bits = np.asarray(x).reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
        by_hand = {
            1: sum(int(b) * (2 * n + 1) for n, b in enumerate(bits)) % 2**32,
            2: sum(support.fmix32(int(b) + (n + 1) * 0x9E3779B1) for n, b in enumerate(bits)) % 2**32 + 2**32,
        }
        for version, expected in by_hand.items():
            assert fingerprints({"x": x}, version=version) == {"['x']": expected}
            assert int(_sums({"x": x}, version)["x"]) == expected % 2**32
            running = Running(version)
            for first, last in ((0, 1), (1, 4), (4, 5)):
                running.add(np.asarray(x)[first:last])
            assert running.value == expected
            assert version_of([expected]) == version


def test_an_array_of_the_other_sign_or_twice_as_large_has_another_fingerprint():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    numbers = [fingerprints({"x": jnp.asarray(factor * x)})["['x']"] for factor in (1, 2, -1, 4, -2)]
    assert len(set(numbers)) == 5
    old = [fingerprints({"x": jnp.asarray(factor * x)}, version=1)["['x']"] for factor in (1, 2, -1, 4, -2)]
    assert len(set(old)) == 1  # why there is a second version


def test_a_run_of_an_earlier_version_loads_and_its_damage_is_noticed(sound, tiny, tmp_path):
    folder = shutil.copytree(sound / "run", tmp_path / "run")
    values = {path: v.get_value() for path, v in vlm.variables(tiny.model).items()}
    saved = folder / "checkpoints" / "0" / run_dir.FINGERPRINTS
    old = fingerprints((values,), version=1)
    saved.write_text(json.dumps({"fingerprints": old}))
    convert(folder, tmp_path / "new")
    assert support.raw_tensors(tmp_path / "new") == support.raw_tensors(sound / "hf")
    jvlm.load(folder)
    path = next(path for path in old if "patch_embed" in path)
    saved.write_text(json.dumps({"fingerprints": {**old, path: old[path] ^ 1}}))
    for read in (jvlm.load, lambda folder: convert(folder, tmp_path / "again")):
        with pytest.raises(WeightError, match="patch_embed"):
            read(folder)
