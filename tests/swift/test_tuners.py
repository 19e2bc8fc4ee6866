"""``jvlm sft`` with other tuners than plain LoRA, and ``jvlm pt``, on a small checkpoint, from the command line on."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import jvlm
from jvlm import cli
from jvlm.models import vlm
from tests import support
from tests.training.support import write_examples

pytestmark = pytest.mark.slow
SHORT = """--model model --dataset examples.jsonl --max_steps 4 --save_steps 4 --logging_steps 1 --max_length 512
--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --learning_rate 1e-2 --output_dir out"""


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer_folder):
    """A folder with examples, and a model whose widths are whole blocks of NF4."""
    folder = tmp_path_factory.mktemp("tuners")
    write_examples(folder, 16)
    config = support.tiny_config(support.token_ids(tokenizer_folder), intermediate_size=128)
    support.write_folder(folder / "model", tokenizer_folder, config, limits=(4 * 784, 64 * 784))
    support.write_tensors(folder / "model", support.random_tensors(support.tensor_shapes(config)))
    return folder


@pytest.fixture
def train(data, tmp_path, monkeypatch, capfd):
    """Run a command in a folder with ``model`` and ``examples.jsonl``; returns its checkpoint and what it printed."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(command, words):
        assert cli.main([command, *SHORT.split(), *words.split()]) == 0
        (run,) = (tmp_path / "out").iterdir()
        # that of the first step, which nobody asked for, is not among them
        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
        assert f"jvlm infer --adapters out/{run.name}/checkpoint-4" in capfd.readouterr().out
        return run / "checkpoint-4"

    return run


def losses(checkpoint):
    lines = (checkpoint.parent / "logging.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def test_qlora_trains_beside_codes_of_four_bits_and_leaves_the_base_alone(train, tmp_path):
    before = load_file(tmp_path / "model" / "model.safetensors")
    checkpoint = train("sft", "--quant_method bnb --quant_bits 4")
    settings = json.loads((checkpoint.parent / "experiment.json").read_text())["quantize"]
    assert settings["kind"] == "nf4"
    assert losses(checkpoint)[-1] < losses(checkpoint)[0]
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(np.array_equal(before[name], value) for name, value in after.items())
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert all(np.any(value) for name, value in tensors.items() if "lora_B" in name)
    # and the adapter goes onto the base that is not quantised, merged by the other command
    assert cli.main(["merge-lora", "--adapters", str(checkpoint)]) == 0
    merged = load_file(f"{checkpoint}-merged/model.safetensors")
    changed = {name for name, value in merged.items() if not np.array_equal(value, before[name])}
    assert len(changed) == len(tensors) / 2 == 14


def test_dora_learns_magnitudes_which_peft_s_files_hold(train):
    checkpoint = train("sft", "--use_dora true")
    assert json.loads((checkpoint / "adapter_config.json").read_text())["use_dora"] is True
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    stored = load_file("model/model.safetensors")
    magnitudes = {name: value for name, value in tensors.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == 14
    for name, value in magnitudes.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        length = np.linalg.norm(stored[f"{module.replace('.language_model.', '.')}.weight"], axis=1)
        np.testing.assert_allclose(value, length, rtol=0.2)  # begins there
        assert np.abs(value - length).max() > 1e-3
    assert losses(checkpoint)[-1] < losses(checkpoint)[0]


def test_pt_trains_whole_models_on_prompts_too(train):
    checkpoint = train("pt", "--train_type full --freeze_vit false --freeze_aligner false")
    values = json.loads((checkpoint / "args.json").read_text())
    assert (values["command"], values["loss_scale"]) == ("pt", "all")
    assert json.loads((checkpoint.parent / "experiment.json").read_text())["data"]["loss"] == "all"
    before, after = (vlm.parameters(jvlm.load(folder)[0]) for folder in ("model", checkpoint))
    frozen = [path for path in before if np.array_equal(before[path].get_value(), after[path].get_value())]
    assert frozen == []
    # prompts are many of the tokens: what was learnt of them shows on a prompt's own loss
    assert losses(checkpoint)[-1] < 0.9 * losses(checkpoint)[0]
