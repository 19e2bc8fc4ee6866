"""Adapters that jvlm writes, in PEFT 0.21 with transformers 5 and in PEFT 0.15 with 4.51: `make test-exports`.

Each version lies in a folder of its own, which is put before the packages of the environment.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import Qwen3VLMoeForConditionalGeneration

import jvlm
from jvlm import configs
from jvlm.adapters import neutral
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.merge_folder import merge_folder
from jvlm.adapters.peft_load import with_adapter
from jvlm.adapters.peft_read import read_peft
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.weights import AdapterWeights, LowRank, Target, TokenRows
from jvlm.models import vlm
from jvlm.training import starting_model
from jvlm.weights import hf
from tests import support
from tests.adapters import demo_in_peft, golden
from tests.families import idefics3, qwen2_vl, qwen3_vl

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


def run_with_peft(program, requests, folder, packages):
    """Run a program of this folder with one version of PEFT; returns the versions that it found."""
    (folder / "request.json").write_text(json.dumps(requests))
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / packages), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, support.ROOT / "tests/adapters" / program, folder / "request.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


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
    versions = run_with_peft("read_adapter.py", requests, tmp_path, packages)
    assert versions["peft"].startswith(peft)
    assert versions["transformers"].startswith(transformers)
    for name, (out, expected) in wanted.items():
        found = load_file(out)["logits"]
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0, err_msg=name)


MESSAGES = [{"role": "user", "content": "<image>what is the cat?"}, {"role": "assistant", "content": "a circle"}]
EXAMPLE = {"messages": MESSAGES, "images": [support.picture(98, 70)]}
# how a checkpoint is made, what transformers' processors give for an example, and the layouts of its age
FAMILIES = {
    "qwen2_vl": (qwen2_vl.create, support.hf_inputs, ("new", "old")),
    "qwen3_vl": (functools.partial(qwen3_vl.Tiny.create, kind="qwen3_vl"), qwen3_vl.inputs_of, ("new",)),
    "idefics3": (lambda folder, _: idefics3.create(folder, "idefics3"), idefics3.inputs_of, ("new", "old")),
    "smolvlm": (lambda folder, _: idefics3.create(folder, "smolvlm"), idefics3.inputs_of, ("new", "old")),
}


class Asked:
    """A base of a family with an example, and adapters of it that PEFT is asked about."""

    def __init__(self, folder, make, inputs_of):
        self.folder, self.inputs_of = folder, inputs_of
        self.tiny = make(folder / "base", support.make_tokenizer(folder / "tokenizer"))
        given = {name: value.contiguous() for name, value in inputs_of(self.tiny, EXAMPLE).items()}
        save_torch_file(given, folder / "inputs.safetensors")
        self.batch, self.count = self.tiny.processor.pack([EXAMPLE]), given["input_ids"].shape[1]

    def logits(self, model):
        return np.asarray(model(self.batch))[:, : self.count]

    def weights(self, config):
        """An adapter of a configuration that changes answers."""
        weights, rng = extract(attach(self.tiny.model, config)), np.random.default_rng(0)
        low_rank = {
            target: dataclasses.replace(low, b=rng.standard_normal(low.b.shape).astype(np.float32) / 8)
            for target, low in weights.low_rank.items()
        }
        return dataclasses.replace(weights, low_rank=low_rank)

    def request(self, name, **more):
        place = {"base": self.folder / "base", "inputs": self.folder / "inputs.safetensors"}
        place |= {"adapter": self.folder / name, "out": self.folder / name / "out.safetensors"}
        return {**{key: str(path) for key, path in place.items()}, **more}


@pytest.mark.parametrize("layout", READERS)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_every_tower_of_the_other_families_answer_in_peft_as_here(layout, use_dora, tmp_path):
    requests, wanted = [], {}
    for name, (make, inputs_of, layouts) in FAMILIES.items():
        if layout in layouts:
            asked = Asked(tmp_path / name, make, inputs_of)
            targets = ("encoder", "connector", "decoder")
            weights = asked.weights(AdapterConfig(rank=3, alpha=6.0, targets=targets, use_dora=use_dora))
            write_peft(weights, asked.tiny.model.config, asked.folder / "ours", layout=layout)
            requests.append(asked.request("ours"))
            wanted[name] = asked.logits(attach(asked.tiny.model, weights))
            assert np.abs(wanted[name] - asked.logits(asked.tiny.model)).max() > 0.1
    packages, peft, _ = READERS[layout]
    assert run_with_peft("read_adapter.py", requests, tmp_path, packages)["peft"].startswith(peft)
    for request, (name, expected) in zip(requests, wanted.items(), strict=True):
        np.testing.assert_allclose(load_file(request["out"])["logits"], expected, atol=2e-4, err_msg=name)


EXPERTS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PEFT_S_OWN = {
    "both": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "linear_fc1"], "target_parameters": [*EXPERTS]},
    "one": {"r": 2, "use_rslora": True, "target_modules": [], "target_parameters": [f"layers.1.{EXPERTS[1]}"]},
}


def test_adapters_of_experts_answer_in_peft_as_here_both_ways_and_merged_in_transformers(tmp_path):
    """Of Qwen3-VL with experts: ours with a rank of its own for some experts, and those that PEFT made."""
    make = functools.partial(qwen3_vl.Tiny.create, kind="qwen3_vl_moe")
    asked = Asked(tmp_path, make, qwen3_vl.inputs_of)
    base, config = asked.tiny.model, asked.tiny.model.config
    adapter = AdapterConfig(rank=3, alpha=6.0, targets=("decoder", "connector"))
    adapter = dataclasses.replace(adapter, exclude=("re:.*layers.3.*down_proj.*",))
    weights = asked.weights(dataclasses.replace(adapter, rank_pattern=((r".*gate_proj\.2", 5),)))
    write_peft(weights, config, tmp_path / "ours", base_name="org/base")
    expected = {"ours": asked.logits(attach(base, weights))}
    assert np.abs(expected["ours"] - asked.logits(base)).max() > 0.1
    made = [asked.request(name, settings=s) | {"out": str(tmp_path / name)} for name, s in PEFT_S_OWN.items()]
    assert run_with_peft("make_expert_adapters.py", made, tmp_path, "export-peft")["peft"].startswith("0.21")
    for name in PEFT_S_OWN:
        found = asked.logits(with_adapter(base, tmp_path / name))
        np.testing.assert_allclose(found, load_file(tmp_path / name / "expected.safetensors")["logits"], atol=2e-4)
        expected[f"{name}_again"] = found
        write_peft(read_peft(tmp_path / name, config), config, tmp_path / f"{name}_again")
    run_with_peft("read_adapter.py", [asked.request(name) for name in expected], tmp_path, "export-peft")
    for name, wanted in expected.items():
        np.testing.assert_allclose(load_file(tmp_path / name / "out.safetensors")["logits"], wanted, atol=2e-4)
    merge_folder(tmp_path / "base", tmp_path / "ours", tmp_path / "merged")
    merged = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found = merged(**qwen3_vl.inputs_of(asked.tiny, EXAMPLE)).logits.numpy()
    np.testing.assert_allclose(found, expected["ours"], atol=2e-4)


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
