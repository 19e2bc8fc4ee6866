"""``jvlm export`` on a small checkpoint: what it writes, read by other libraries' rules, and what it refuses."""

import json
import shutil

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file

import jvlm
from jvlm import cli
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.models import vlm
from tests import support
from tests.adapters.test_several import random_adapter
from tests.training.support import write_examples

# of the language model alone, as the freeze flags leave it; rsLoRA and alphas by pattern are what some readers ignore
LORA = AdapterConfig(
    rank=4,
    targets=("all-linear",),
    exclude=("encoder", "connector"),
    use_rslora=True,
    alpha_pattern=(("q_proj", 3.0),),
)
GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
GGUF_NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """A folder with ``model``, and adapters ``lora`` and ``dora`` on it."""
    made = tmp_path_factory.mktemp("export")
    shutil.copytree(tiny.folder, made / "model")
    for name, config in (("lora", LORA), ("dora", AdapterConfig(rank=2, targets=("q_proj",), use_dora=True))):
        write_peft(random_adapter(tiny.model, config, 1), tiny.model.config, made / name, base_name="model")
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working directory of a user."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*words):
    assert cli.main(["export", *map(str, words)]) == 0


def tensors(path):
    found = GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in found}


def products(folder):
    """Module -> what the PEFT folder of a LoRA adds to its matrix, by PEFT's rules."""
    config, values = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    found = {}
    for name, a in values.items():
        if ".lora_A." in name:
            module, b = name.partition(".lora_A.")[0], values[name.replace("lora_A", "lora_B")]
            patterns = config["alpha_pattern"].items()
            alpha = next((alpha for key, alpha in patterns if module.endswith(key)), config["lora_alpha"])
            scale = alpha / (a.shape[0] ** 0.5 if config["use_rslora"] else a.shape[0])
            found[module.removeprefix("base_model.model.")] = scale * b.astype(np.float64) @ a
    return found


def test_a_model_becomes_the_gguf_files_of_its_tensors(folder, tiny):
    export("--model", "model", "--to_gguf", "true", "--gguf_type", "f32", "--mmproj_type", "f32")
    text, vision = (tensors(folder / "model-gguf" / f"{name}model-f32.gguf") for name in ("", "mmproj-"))
    stored = load_file(folder / "model" / "model.safetensors")
    for theirs, mine in GGUF_NAMES.items():
        part = "self_attn" if mine.startswith("attn") else "mlp"
        np.testing.assert_array_equal(text[f"blk.1.{mine}.weight"], stored[f"model.layers.1.{part}.{theirs}.weight"])
    np.testing.assert_array_equal(text["output.weight"], stored["lm_head.weight"])
    qkv = np.split(stored["visual.blocks.0.attn.qkv.weight"], 3)
    for letter, value in zip("qkv", qkv, strict=True):
        np.testing.assert_array_equal(vision[f"v.blk.0.attn_{letter}.weight"], value)
    np.testing.assert_array_equal(vision["mm.2.weight"], stored["visual.merger.mlp.2.weight"])
    assert len(text) + len(vision) == len(stored) + 1 + 3 * 2 * 2  # two frames; queries, keys and values apart


def test_an_adapter_becomes_a_gguf_file_by_itself_and_a_model_once_merged(folder):
    export("--adapters", "lora", "--to_gguf", "true")
    path = folder / "lora-gguf" / "lora-lora-f32.gguf"
    alpha, low = GGUFReader(path).fields["adapter.lora.alpha"].contents(), tensors(path)
    export("--adapters", "lora", "--merge_lora", "true", "--to_gguf", "true", "--gguf_type", "f32")
    merged = tensors(folder / "lora-merged-gguf" / "lora-merged-f32.gguf")
    base, added = load_file(folder / "model" / "model.safetensors"), products(folder / "lora")
    assert len(added) == len(low) / 2 == 14
    for module, product in added.items():
        layer, role = module.split(".layers.")[1].partition(".")[0], module.rpartition(".")[2]
        name = f"blk.{layer}.{GGUF_NAMES[role]}.weight"
        a, b = low[f"{name}.lora_a"], low[f"{name}.lora_b"]
        np.testing.assert_allclose(alpha / len(a) * b @ a, product, atol=2e-6)
        kept = base[f"{module.replace('model.language_model.', 'model.')}.weight"]
        np.testing.assert_allclose(merged[name], kept + product, atol=2e-6)


def test_the_plain_form_adds_the_same_with_a_scale_of_one(folder):
    export("--adapters", "lora", "--plain_lora", "true")
    settings = json.loads((folder / "lora-plain" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == settings["r"]
    assert not settings["use_rslora"]
    assert not settings["alpha_pattern"]
    before, after = products(folder / "lora"), products(folder / "lora-plain")
    assert before.keys() == after.keys()
    for module, product in before.items():
        np.testing.assert_allclose(after[module], product, atol=1e-6)


def test_gguf_files_are_uploaded_with_a_card_that_says_what_they_are(folder, capsys):
    words = "--model model --to_gguf true --output_dir out --push_to_hub true --hub_model_id a/b --dry_run true"
    export(*words.split())
    printed = capsys.readouterr().out
    assert "3 files" in printed
    assert "mmproj-model-f16.gguf" in printed
    from jvlm.hub import card

    text = card.of_folder(folder / "out").text("a/b")
    assert "library_name: gguf" in text
    assert "llama-server" in text
    assert "jvlm.load" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model model", "nothing to do: give --merge_lora, --quant_method, --to_gguf"),
        ("--model nowhere --to_gguf true", "nowhere is not a folder here"),
        ("--adapters nowhere --merge_lora true", "--adapters nowhere is not a folder"),
        ("--adapters lora dora --merge_lora true", "give one checkpoint, got lora, dora"),
        ("--model model --merge_lora true", "model holds no adapter to merge"),
        ("--model model --plain_lora true", "--plain_lora rewrites an adapter"),
        ("--adapters dora --plain_lora true", "no plain form"),
        ("--adapters dora --to_gguf true", "merge it into its base (jvlm export --merge_lora true)"),
        ("--model model --to_gguf true --quant_method fp8", "run jvlm export once for each"),
        ("--adapters lora --plain_lora true --merge_lora true", "give one of them"),
        ("--model model --to_gguf true --gguf_type q4_k_m", "one of f32, f16, bf16, q8_0"),
        ("--model model --to_ollama true", "--to_gguf true"),
        ("--model model --quant_method gptq", "give --dataset FILE, or --load_data_args true"),
        ("--model model --quant_method awq --dataset nothing.jsonl", "no data file matches 'nothing.jsonl'"),
        ("--model model --quant_method bnb", "jvlm export fp8, gptq, awq or rtn"),
        ("--model model --quant_method rtn", "groups of 128 do not divide; choose another group_size, as 64"),
        ("--model model --quant_method fp8 --load_data_args true --dataset a", "leave out --dataset"),
        ("--model model --quant_method fp8 --output_dir lora", "lora is not empty"),
        ("--model model --push_to_hub true", "needs --hub_model_id"),
        ("--model model --lora_rank 4", "--lora_rank, which is one of jvlm sft"),
        ("--model model --quant_metod fp8", "did you mean --quant_method?"),
    ],
)
def test_a_mistake_is_one_message(folder, capsys, words, message):
    before = sorted(folder.iterdir())
    assert cli.main(["export", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_what_is_there_already_is_not_overwritten(folder, capsys):
    export("--adapters", "lora", "--merge_lora", "true")
    assert cli.main("export --adapters lora --merge_lora true --to_gguf true".split()) == 2
    assert "go on with it (--model lora-merged" in capsys.readouterr().err
    export("--model", "lora-merged", "--to_gguf", "true")
    assert cli.main("export --model lora-merged --to_gguf true".split()) == 2
    assert "lora-merged-f16.gguf is there already" in capsys.readouterr().err


def test_check_for_names_the_option_that_mends_it(folder, capsys):
    export("--adapters", "lora", "--check_for", "sglang", "transformers")
    sglang, transformers = capsys.readouterr().out.split("transformers: ")
    assert "jvlm export --plain_lora true does that" in sglang
    assert transformers.startswith("reads all of")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["fp8", "rtn --quant_bits 8", "gptq --dataset examples.jsonl", "awq --dataset examples.jsonl#9"]
)
def test_a_quantised_export_answers_nearly_as_the_adapted_model(
    tmp_path, monkeypatch, capsys, tokenizer_folder, method
):
    monkeypatch.chdir(tmp_path)
    config = support.tiny_config(support.token_ids(tokenizer_folder), intermediate_size=128, num_key_value_heads=4)
    support.write_folder(tmp_path / "model", tokenizer_folder, config, limits=(4 * 784, 64 * 784))
    support.write_tensors(tmp_path / "model", support.random_tensors(support.tensor_shapes(config)))
    write_examples(tmp_path, 16)
    model, processor = jvlm.load("model")
    write_peft(random_adapter(model, LORA, 1), model.config, tmp_path / "lora", base_name="model")
    export("--adapters", "lora", "--quant_method", *method.split(), "--group_size", "32", "--max_length", "256")
    printed = capsys.readouterr().out
    assert ("calibrated on" in printed) == ("--dataset" in method)
    (made,) = (path for path in tmp_path.iterdir() if path.name.startswith("lora-"))
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    batch = processor.pack([json.loads((tmp_path / "examples.jsonl").read_text().splitlines()[0])])
    adapted, quantised = (np.asarray(m(batch)) for m in (jvlm.load("model", adapter="lora")[0], jvlm.load(made)[0]))
    base = np.asarray(model(batch))
    away = np.abs(quantised - adapted).mean()
    assert 0 < away < 0.5 * np.abs(base - adapted).mean()  # the adapter is in it
    assert vlm.parameters(jvlm.load(made)[0]).keys() == vlm.parameters(model).keys()
