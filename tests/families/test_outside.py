"""A family of another package, installed beside jvlm, works through the public calls as those of jvlm do."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file

import jvlm
from jvlm import families
from jvlm.errors import UserError
from jvlm.families import GGUFFormat, GGUFVision, registry
from jvlm.weights.gguf_export import write_text, write_vision
from tests import support

PACKAGE = Path(__file__).parent / "toy_package" / "toy_vlm"
D, F, H, KV, V, LAYERS, E = 32, 48, 4, 2, 352, 2, 24


def install(site, name="toy_vlm", target="toy_vlm:FAMILY"):
    """Lay out what pip leaves of a package whose pyproject.toml has

    [project.entry-points."jvlm.families"]
    toy_vlm = "toy_vlm:FAMILY"
    """
    info = site / "toy_vlm-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-vlm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[jvlm.families]\n{name} = {target}\n")
    shutil.copytree(PACKAGE, site / "toy_vlm")
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the package is installed, on the path of this process."""
    folder = install(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def folder(site, tokenizer_folder, tmp_path_factory):
    """A random checkpoint of the family."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    ids = support.token_ids(folder)
    values = {
        "model_type": "toy_vlm",
        "vision_hidden_size": E,
        "image_token_id": ids["<|image_pad|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": KV,
        "intermediate_size": F,
    }
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "preprocessor_config.json").write_text(json.dumps({"grid": 3}))
    shapes = {
        "vision.patch.weight": (E, 3, 14, 14),
        "vision.patch.bias": (E,),
        "vision.mix.weight": (E, E),
        "projector.norm.weight": (E,),
        "projector.hidden.weight": (E, E),
        "projector.hidden.bias": (E,),
        "projector.out.weight": (D, E),
        "projector.out.bias": (D,),
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(LAYERS):
        layer, kv = f"model.layers.{i}", D // H * KV
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (n, D) for p, n in zip("qkvo", (D, kv, kv, D), strict=True)}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (F, D) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (D, F)
        shapes |= {f"{layer}.{n}.weight": (D,) for n in ("input_layernorm", "post_attention_layernorm")}
    support.write_tensors(folder, support.random_tensors(shapes))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return jvlm.load(folder)


def conversation(seed=0, **fields):
    image = support.picture(40, 30, seed=seed)
    return {"messages": [{"role": "user", "content": "<image>what is it?"}], "images": [image], **fields}


def answers(model, processor):
    return jvlm.generate(model, processor, [conversation()], max_new_tokens=8, temperature=0.0)


def test_it_is_found_beside_those_of_jvlm(site):
    assert set(families.names()) == {
        "composed",
        "idefics2",
        "idefics3",
        "mm1_5",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "smolvlm",
        "toy_vlm",
    }
    assert "toy_vlm" in families.model_types()
    assert families.image_limits()["grid"][1] == ("toy_vlm",)


def test_it_packs_images_and_the_model_reads_them(loaded):
    model, processor = loaded
    batch = processor.pack([conversation()])
    assert processor.image_config.grid == 3  # of preprocessor_config.json
    assert int((batch.vision_index >= 0).sum()) == 9
    smaller = processor.pack([conversation(chat_template_kwargs={"grid": 2})])
    assert int((smaller.vision_index >= 0).sum()) == 4
    one, other = (np.asarray(model(processor.pack([conversation(seed)]))) for seed in (0, 1))
    assert one.shape == (*batch.tokens.shape, V)
    assert np.abs(one - other).max() > 1e-3


def test_an_export_is_byte_identical_and_answers_alike(loaded, folder, tmp_path):
    jvlm.save(*loaded, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    wanted = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == {**wanted, "torch_dtype": "float32"}
    assert answers(*jvlm.load(tmp_path)) == answers(*loaded)


@pytest.mark.slow
def test_a_new_process_reads_its_run_folder_and_knows_its_options(loaded, site, tmp_path):
    """Nothing there has imported the package before the run folder names its types."""
    jvlm.save(*loaded, tmp_path / "run", format="jvlm")
    support.picture(40, 30, seed=0).save(tmp_path / "a.png")
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import jvlm
model, processor = jvlm.load({str(tmp_path / "run")!r})
example = {{"messages": [{{"role": "user", "content": "<image>what is it?"}}], "images": [{str(tmp_path / "a.png")!r}]}}
print(repr(jvlm.generate(model, processor, [example], max_new_tokens=8, temperature=0.0)))
"""
    assert support.run_python(code, timeout=600).strip().splitlines()[-1] == repr(answers(*loaded))


def test_its_arithmetic_is_declared(loaded):
    from jvlm.training import flops

    model, processor = loaded
    parts = flops.of_batch(model, [processor.pack([conversation()])], flops.Trained.towers("decoder"))
    assert parts.encoder == 2 * 9 * (3 * 14**2 * E + E * E)


@pytest.mark.parametrize(
    ("name", "target", "problem"),
    [
        ("broken", "toy_vlm:NOTHING", r"family 'broken' of the package toy-vlm \(toy_vlm:NOTHING\) cannot be loaded"),
        ("absent", "no_such_module:FAMILY", "cannot be loaded: No module named 'no_such_module'"),
        ("other", "toy_vlm:FAMILY", "is the family 'toy_vlm'; the entry point must name a Family of the same name"),
        ("number", "toy_vlm:PACKAGE_VERSION", "cannot be loaded"),
        ("idefics2", "toy_vlm:FAMILY", "has the name of a family of jvlm"),
    ],
)
def test_a_package_that_is_wrong_is_named_and_stands_in_no_family_s_way(tmp_path, monkeypatch, name, target, problem):
    monkeypatch.syspath_prepend(str(install(tmp_path, name, target)))
    assert families.get("qwen2_5_vl").name == "qwen2_5_vl"
    with pytest.raises(UserError, match=problem):
        families.for_model_type("unheard_of")


def test_an_unknown_family_is_told_from_those_that_are_known():
    with pytest.raises(UserError, match=r"model family 'qwen2_5vl' .* did you mean 'qwen2_5_vl'.*jvlm\.families"):
        families.get("qwen2_5vl")
    with pytest.raises(UserError, match=r"model_type 'blip' is not supported; supported: .*qwen2_5_vl.*entry point"):
        families.for_model_type("blip")
    with pytest.raises(UserError, match="preset 'qwen2_5_vl_8b' is not known; did you mean 'qwen2_5_vl_"):
        families.preset("qwen2_5_vl_8b")


def test_its_gguf_record_is_what_gguf_files_are_written_by(site, folder, tmp_path, monkeypatch):
    model, _ = jvlm.load(folder)
    with pytest.raises(UserError, match="family 'toy_vlm' have no GGUF form; written are those of composed, "):
        write_text(model, tmp_path / "a.gguf")
    family = families.get("toy_vlm")
    vision = GGUFVision(
        lambda writer, config: writer.add_clip_projector_type("toy"),
        lambda name, _: iter([("v.mix.weight", lambda value: value[:2])] if name == "vision.mix.weight" else []),
    )
    monkeypatch.setattr(registry, "get", lambda name: dataclasses.replace(family, gguf=form))
    monkeypatch.setattr(families, "get", registry.get)
    form = GGUFFormat(lambda config: "llama", vision=vision)
    write_text(model, tmp_path / "text.gguf", format="f32")
    write_vision(model, tmp_path / "vision.gguf", format="f32")
    text, seen = GGUFReader(tmp_path / "text.gguf"), GGUFReader(tmp_path / "vision.gguf")
    assert text.fields["general.architecture"].contents() == "llama"
    assert seen.fields["clip.projector_type"].contents() == "toy"
    (tensor,) = seen.tensors
    np.testing.assert_array_equal(tensor.data, load_file(folder / "model.safetensors")["vision.mix.weight"][:2])
