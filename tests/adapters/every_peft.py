"""Adapters that jvlm writes, in PEFT 0.21 with transformers 5 and in PEFT 0.15 with 4.51: `make test-exports`.

Each version lies in a folder of its own, which is put before the packages of the environment.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jvlm
from jvlm import configs
from jvlm.adapters import neutral
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.merge_folder import merge_folder
from jvlm.adapters.peft_read import read_peft
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.weights import AdapterWeights, LowRank, Target, TokenRows
from jvlm.models import vlm
from jvlm.training import starting_model
from jvlm.weights import hf
from tests import support
from tests.adapters import demo_in_peft, golden

# Layout of the names, folders of packages, version of PEFT and of transformers.
READERS = {"new": ("export-peft", "0.21", "5."), "old": ("export-peft-0.15", "0.15", "4.51")}


def saved_beside_lora(family, layout):
    """LoRA of one text map with whole modules and single rows of tokens.

    PEFT 0.15 cannot call a whole perceiver, which takes its inputs by name: Idefics2's projection is saved then.
    """
    perceiver = family == "idefics2" and layout == "new"
    rng = np.random.default_rng(0)
    parameters = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(golden.base(family)).items()}
    whole = {}
    for path, value in parameters.items():
        if path.startswith("connector.") and (family == "qwen2_5_vl" or ("projection" in path) != perceiver):
            for index in [(i,) for i in range(len(value))] if ".layer." in path else [()]:
                noise = rng.standard_normal(value[index].shape).astype(np.float32)
                whole[Target(path, index)] = value[index] + noise / 10
    rows = {
        path: TokenRows(np.array([3, 95]), rng.standard_normal((2, 32)).astype(np.float32))
        for path in ("decoder.embedding", "decoder.head.kernel")
    }
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 3), (3, 32)))
    low_rank = {Target("decoder.blocks.layer.attention.q.kernel", (1,)): LowRank(a, b, 0.5, 1.5)}
    return AdapterWeights(AdapterConfig(rank=3, alpha=1.5), low_rank, whole, rows)


def biases(family):
    """LoRA beside all biases of the base, which are trained."""
    weights, rng = read_peft(golden.ROOT / family / "lora", golden.base(family).config), np.random.default_rng(0)
    whole = {}
    for path, variable in vlm.parameters(golden.base(family)).items():
        value = np.asarray(variable.get_value())
        for index in [(i,) for i in range(len(value))] if ".layer." in path else [()]:
            if path.endswith(".bias"):
                noise = rng.standard_normal(value[index].shape).astype(np.float32)
                whole[Target(path, index)] = value[index] + noise / 10
    return dataclasses.replace(weights, config=dataclasses.replace(weights.config, bias="all"), parameters=whole)


def cases(layout):
    """(name, family, weights, expected logits) of every adapter: golden ones, and ours against our own model."""
    for family, case in golden.CASES:
        weights = read_peft(golden.ROOT / family / case, golden.base(family).config)
        yield f"{family}/{case}", family, weights, golden.expected(family, case)["logits"]
        if case in ("lora", "rslora"):
            yield f"{family}/{case}_plain", family, neutral.plain(weights), golden.expected(family, case)["logits"]
    for family in ("qwen2_5_vl", "idefics2"):
        for name, weights in (("saved_beside_lora", saved_beside_lora(family, layout)), ("biases", biases(family))):
            expected = np.asarray(attach(golden.base(family), weights)(golden.batch(family)))
            yield f"{family}/{name}", family, weights, expected
        bf16 = read_peft(golden.ROOT / family / "lora", golden.base(family).config)
        halved = {
            t: dataclasses.replace(low, a=low.a.astype(ml_dtypes.bfloat16), b=low.b.astype(ml_dtypes.bfloat16))
            for t, low in bf16.low_rank.items()
        }
        weights = dataclasses.replace(bf16, low_rank=halved)
        expected = np.asarray(attach(golden.base(family), weights)(golden.batch(family)))
        yield f"{family}/bfloat16", family, weights, expected


def tied(folder):
    """A base with one table for embedding and head, and a LoRA beside another table of both."""
    place = golden.ROOT / "qwen2_5_vl/base"
    folder.mkdir()
    values = json.loads((place / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    tensors = {name: v for name, v in load_file(place / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = hf.load_weights(folder, hf.read_config(folder))
    weights = read_peft(golden.ROOT / "qwen2_5_vl/lora", model.config)
    table = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    weights = dataclasses.replace(weights, parameters={Target("decoder.embedding"): table})
    return model, weights


@pytest.mark.parametrize("layout", READERS)
def test_peft_answers_with_our_adapters_as_we_do(tmp_path, layout):
    packages, peft, transformers = READERS[layout]
    requests, wanted = [], {}
    for name, family, weights, expected in cases(layout):
        adapter = tmp_path / name
        write_peft(weights, golden.base(family).config, adapter, layout=layout, base_name="org/base")
        place = golden.ROOT / family
        out = str(adapter / "out.safetensors")
        inputs = str(place / "inputs.safetensors")
        requests.append({"base": str(place / "base"), "adapter": str(adapter), "inputs": inputs, "out": out})
        wanted[name] = out, expected
    model, weights = tied(tmp_path / "tied_base")
    write_peft(weights, model.config, tmp_path / "tied", layout=layout)
    out = str(tmp_path / "tied/out.safetensors")
    wanted["tied"] = out, np.asarray(attach(model, weights)(golden.batch("qwen2_5_vl")))
    inputs = str(golden.ROOT / "qwen2_5_vl/inputs.safetensors")
    request = {"base": str(tmp_path / "tied_base"), "adapter": str(tmp_path / "tied"), "inputs": inputs, "out": out}
    requests.append(request)
    (tmp_path / "request.json").write_text(json.dumps(requests))
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / packages), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, support.ROOT / "tests/adapters/read_adapter.py", tmp_path / "request.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    versions = json.loads(result.stdout.splitlines()[-1])
    assert versions["peft"].startswith(peft)
    assert versions["transformers"].startswith(transformers)
    for name, (out, expected) in wanted.items():
        found = load_file(out)["logits"]
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0, err_msg=name)


def test_the_demo_with_an_adapter_answers_in_peft_as_here_and_merged_in_transformers(tmp_path):
    """Its architecture with random weights: image processor, template, greedy tokens on photos of `demo-finetune`."""
    demo = dataclasses.replace(configs.load("mimo_vl/easy_vqa", []), stages=())
    model, processor = starting_model.start_model(demo)
    jvlm.save(model, processor, tmp_path / "base")
    weights = extract(attach(model, configs.load("finetune/white_cells", []).adapter))
    rng = np.random.default_rng(0)
    low_rank = {
        target: dataclasses.replace(low, b=rng.standard_normal(low.b.shape).astype(np.float32) / 8)
        for target, low in weights.low_rank.items()
    }
    write_peft(dataclasses.replace(weights, low_rank=low_rank), model.config, tmp_path / "adapter")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = demo_in_peft.compared(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert len(found["jvlm base"]) >= 20
    assert found["transformers base"] == found["jvlm base"]
    assert found["PEFT adapter"] == found["transformers merged"] == found["jvlm merged"] == found["jvlm adapter"]
    assert sum(a != b for a, b in zip(found["jvlm base"], found["jvlm adapter"], strict=True)) >= 20
