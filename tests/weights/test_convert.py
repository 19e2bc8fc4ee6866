"""Streaming conversion: the same tensors as loading and saving, never more than one of them in memory."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors import safe_open

import jvlm
from jvlm import config as config_tree
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.weights import hf
from jvlm.weights.convert import convert
from jvlm.weights.table import WeightError
from tests import support


@pytest.fixture(scope="module")
def source(tiny, tokenizer_folder, tmp_path_factory):
    """A sharded snapshot of mixed dtypes with files of every kind beside the weights."""
    folder = tmp_path_factory.mktemp("source")
    support.write_folder(folder, tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    tensors = support.random_tensors(support.tensor_shapes(tiny.config))
    mixed = {n: v if n.startswith("visual.") else v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}
    support.write_tensors(folder, mixed, shards=3)
    (folder / "README.md").write_text("a model card")
    (folder / "LICENSE").write_text("MIT")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def test_a_plain_copy_is_byte_identical_and_brings_every_other_file(source, tmp_path):
    target = tmp_path / "new"
    convert(source, target)
    assert support.raw_tensors(target) == support.raw_tensors(source)
    others = {f.name for f in source.iterdir() if ".safetensors" not in f.name} - {"pytorch_model.bin"}
    assert {f.name for f in target.iterdir()} == others | {"model.safetensors"}
    for name in others - {"config.json"}:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_the_other_layout_and_back_is_byte_identical(source, tmp_path):
    convert(source, tmp_path / "new", layout="transformers", max_shard_bytes=100_000)
    assert set(support.raw_tensors(tmp_path / "new")) == {support.new_layout(n) for n in support.raw_tensors(source)}
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(support.raw_tensors(tmp_path / "new"))
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in support.raw_tensors(source).values())
    convert(tmp_path / "new", tmp_path / "back")
    assert support.raw_tensors(tmp_path / "back") == support.raw_tensors(source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_new_dtype_is_torchs_own_rounding_and_is_announced(source, tmp_path, dtype):
    convert(source, tmp_path / "new", dtype=dtype)
    wanted = getattr(torch, dtype)
    found = support.raw_tensors(tmp_path / "new")
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                expected = tensors.get_tensor(name).to(wanted).view(torch.uint8).numpy().tobytes()
                assert found[name][0] == wanted
                assert found[name][2] == expected, name
    assert json.loads((tmp_path / "new" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_nested_configuration_announces_the_new_dtype_everywhere(tiny, tokenizer_folder, tmp_path):
    support.write_folder(tmp_path / "old", tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    tiny.torch_model.save_pretrained(str(tmp_path / "old"))
    convert(tmp_path / "old", tmp_path / "new", dtype="bfloat16")
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "new"), dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_a_converted_folder_loads_in_transformers_with_the_same_weights(source, tmp_path, layout):
    convert(source, tmp_path / "new", layout=layout, max_shard_bytes=200_000)
    expected = dict(support.torch_model(source).named_parameters())
    for name, value in support.torch_model(tmp_path / "new").named_parameters():
        assert torch.equal(value, expected[name]), name


def test_a_number_that_float16_cannot_hold_is_refused(tiny, tokenizer_folder, tmp_path):
    tensors = support.random_tensors(support.tensor_shapes(tiny.config))
    tensors["model.norm.weight"][3] = 1e5
    support.write_folder(tmp_path / "old", tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    support.write_tensors(tmp_path / "old", tensors)
    with pytest.raises(WeightError, match=r"model.norm.weight holds 100000, and float16 ends at 65504"):
        convert(tmp_path / "old", tmp_path / "new", dtype="float16")
    assert not (tmp_path / "new" / "config.json").exists()


def test_every_wrong_tensor_is_listed_before_anything_is_written(tiny, tokenizer_folder, tmp_path):
    tensors = support.random_tensors(support.tensor_shapes(tiny.config))
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:]
    tensors["extra"] = np.zeros(2, np.float32)
    support.write_folder(tmp_path / "old", tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    support.write_tensors(tmp_path / "old", tensors)
    with pytest.raises(WeightError, match=r"(?s)3 problems.*missing: model.norm.*extra.*wrong shape: lm_head"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_quantised_tensor_is_listed(tiny, tokenizer_folder, tmp_path):
    tensors = support.random_tensors(support.tensor_shapes(tiny.config))
    for name in ("model.norm.weight", "lm_head.weight"):
        tensors[name] = tensors[name].astype(np.int8)
    support.write_folder(tmp_path / "old", tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    support.write_tensors(tmp_path / "old", tensors)
    for call in (lambda: convert(tmp_path / "old", tmp_path / "new"), lambda: jvlm.load(tmp_path / "old")):
        with pytest.raises(WeightError, match=r"(?s)2 tensors of a dtype.*stored as I8.*stored as I8"):
            call()


def test_targets_sources_and_options_are_checked_first(source, tmp_path):
    with pytest.raises(UserError, match="not an empty folder"):
        convert(source, source)
    with pytest.raises(UserError, match="is not a folder"):
        convert(tmp_path / "absent", tmp_path / "new")
    with pytest.raises(UserError, match=r"neither config.json"):
        convert(tmp_path, tmp_path / "new")
    with pytest.raises(UserError, match="unknown layout 'x'; known: released, transformers"):
        convert(source, tmp_path / "new", layout="x")
    with pytest.raises(UserError, match="unknown dtype 'int8'; known: keep, float32, bfloat16, float16"):
        convert(source, tmp_path / "new", dtype="int8")
    with pytest.raises(UserError, match=r"step 3: .* has no steps"):
        convert(source, tmp_path / "new", step=3)
    assert not (tmp_path / "new").exists()


def write_run(folder, tiny, parameters, *, steps=(7,), save_args=None):
    """A run folder as training leaves it, with parameters path -> array."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps({"model": config_tree.to_dict(tiny.model.config)}))
    tiny.processor.tokenizer.save_pretrained(str(folder / "processor"))
    hf.write_processor(folder / "processor", tiny.model.config, tiny.processor)
    with ocp.CheckpointManager(folder.absolute() / "checkpoints", item_names=("params",)) as manager:
        for step in steps:
            scaled = {path: value * (step / steps[-1]) for path, value in parameters.items()}
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(scaled, save_args=save_args)))
        manager.wait_until_finished()
    return folder


@pytest.fixture(scope="module")
def parameters(tiny):
    return {path: v.get_value() for path, v in vlm.parameters(tiny.model).items()}


# a stacked parameter in one chunk, as Orbax writes by default, and in chunks of one layer or less
CHUNKS = {"one chunk": None, "a chunk per layer": ocp.SaveArgs(chunk_byte_size=20_000, shard_axes=(0,))}


@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_run_gives_the_tensors_of_the_model_it_holds(tiny, parameters, tmp_path, chunks):
    save_args = CHUNKS[chunks] and jax.tree.map(lambda _: CHUNKS[chunks], parameters)
    run = write_run(tmp_path / "run", tiny, parameters, steps=(3, 7), save_args=save_args)
    convert(run, tmp_path / "new", max_shard_bytes=100_000)
    assert support.raw_tensors(tmp_path / "new") == support.raw_tensors(tiny.folder)
    model, processor = jvlm.load(tmp_path / "new")
    assert model.config == tiny.model.config
    assert processor.config == tiny.processor.config
    convert(run, tmp_path / "early", step=3, dtype="bfloat16")
    expected = (tiny.torch_model.lm_head.weight.detach() * (3 / 7)).bfloat16()
    dtype, _, data = support.raw_tensors(tmp_path / "early")["lm_head.weight"]
    assert dtype == torch.bfloat16
    found = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(expected.shape)
    torch.testing.assert_close(found, expected)


def test_a_run_converts_as_it_loads_and_saves(tiny, parameters, tmp_path):
    halves = {path: value.astype(jnp.bfloat16) for path, value in parameters.items()}
    run = write_run(tmp_path / "run", tiny, halves)
    convert(run, tmp_path / "new")
    assert {dtype for dtype, *_ in support.raw_tensors(tmp_path / "new").values()} == {torch.bfloat16}
    model, processor = jvlm.load(run)
    jvlm.save(model, processor, tmp_path / "saved", dtype="bfloat16")
    assert support.raw_tensors(tmp_path / "new") == support.raw_tensors(tmp_path / "saved")
    names = [sorted(f.name for f in (tmp_path / which).iterdir()) for which in ("new", "saved")]
    assert names[0] == names[1]


def test_a_run_with_wrong_parameters_or_steps_lists_them(tiny, parameters, tmp_path):
    wrong = {path: value for path, value in parameters.items() if path != "decoder.norm.scale"}
    wrong["decoder.extra"] = jnp.zeros(2)
    wrong["connector.norm.scale"] = jnp.zeros(5)
    run = write_run(tmp_path / "run", tiny, wrong)
    lines = r"(?s)3 problems.*missing: decoder.norm.scale.*unexpected: decoder.extra.*connector.norm.scale is"
    with pytest.raises(WeightError, match=lines):
        convert(run, tmp_path / "new")
    with pytest.raises(WeightError, match=r"no checkpoint of step 5; it has \[7\]"):
        convert(run, tmp_path / "new", step=5)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_not_the_checkpoint(tiny, tokenizer_folder, tmp_path):
    """~300 MB of bfloat16 in ~150 tensors, written as float32; the largest is 17 MB then."""
    largest = support.write_big_checkpoint(tmp_path / "big", tokenizer_folder, shards=3)
    growth = support.run_python(
        support.MEMORY_PROBE
        + f"""
from jvlm.weights.convert import convert
convert({str(tiny.folder)!r}, {str(tmp_path / "warm")!r})  # what imports and first calls allocate
with Peak() as peak:
    convert({str(tmp_path / "big")!r}, {str(tmp_path / "new")!r}, dtype="float32", max_shard_bytes=200_000_000)
print(peak.growth)
import jax._src.xla_bridge
assert not jax._src.xla_bridge._backends, "a conversion must start no device"
"""
    )
    assert int(growth) < 2.5 * largest
