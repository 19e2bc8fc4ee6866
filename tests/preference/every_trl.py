"""Losses, gradients and metrics of TRL's DPO trainer on the same pairs, in its own environment: `make test-exports`.

A text model, because TRL's trainers run it without a vision processor; the folder of a reward model beside it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.example_source import ExampleSource
from jvlm.data.processor import Processor
from jvlm.data.tokenizers import load_tokenizer
from jvlm.families.composed.reward_text import save_text, text_model
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.preference.pairs import PreferenceTask
from jvlm.reward_model.scoring import RewardModel
from jvlm.training.starting_model import random_model
from jvlm.weights import backbones
from jvlm.weights.labels import with_labels
from tests.preference.support import write_text_model

PAIRS = [
    ("what color is the circle?", "it is red.", "it is a blue triangle, or a red circle."),
    ("is there a cat?", "yes, on the chair in the picture.", "no."),
    ("count the objects.", "two.", "three."),
]
TASKS = {
    "dpo": PreferenceTask(),
    "ipo": PreferenceTask(("ipo",)),
    "discopop": PreferenceTask(("discopop",)),
    "aot": PreferenceTask(("aot",)),
    "aot_unpaired": PreferenceTask(("aot_unpaired",)),
    "mpo": PreferenceTask(("sigmoid", "bco_pair"), (0.8, 0.2), 1.0),
}


def load(folder: Path):
    config = text_model(folder, Precision(compute_dtype="float32"))
    return backbones.fill(random_model(config, 0, None), [folder])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(what TRL found, policy, reference, processor, our batch)."""
    folder = tmp_path_factory.mktemp("trl")
    for seed, name in enumerate(("policy", "reference")):
        write_text_model(folder / name, seed)
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for question, chosen, rejected in PAIRS
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packages = Path(sys.prefix) / "export-trl"
    environment = {**os.environ, "PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("pairs_in_trl.py")
    command = [sys.executable, str(script), str(folder), str(path), str(folder / "found.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    policy, reference = load(folder / "policy"), load(folder / "reference")
    tokenizer = load_tokenizer(folder / "policy")
    processor = Processor(tokenizer, policy.config)
    config = DataConfig(train=(str(path),), preference="pairs", seq_len=512, max_patches=0)
    source, encode = ExampleSource.of(config), Encode(processor, config)
    examples = [one for n in range(len(rows)) for one in encode.random_map(source[n], np.random.default_rng(0))]
    batch = packing.assemble([examples], 512, 0)
    return json.loads((folder / "found.json").read_text()), policy, reference, processor, batch, folder


def test_tokens_and_answers_are_those_of_trl(both):
    found, *_, batch, _ = both
    segments, weights = batch.segment_ids[0], batch.loss_weights[0]
    count = len(PAIRS)
    for number in range(2 * count):
        theirs = number // 2 + (number % 2) * count  # all chosen first
        inside = segments == number + 1
        ours, mask = batch.tokens[0][inside].tolist(), (weights[inside] > 0).astype(int).tolist()
        end = len(found["dpo"]["tokens"][theirs])
        assert ours[:end] == found["dpo"]["tokens"][theirs]
        assert mask[:end] == found["dpo"]["masks"][theirs]


@pytest.mark.parametrize("name", TASKS)
def test_losses_gradients_and_metrics_are_those_of_trl(both, name):
    found, policy, reference, _, batch, _ = both
    task, arrays = TASKS[name], jax.tree.map(jnp.asarray, batch)
    values = {path: v.get_value() for path, v in vlm.variables(policy).items()}

    def loss(values):
        one = task.loss(vlm.bind(policy, values), arrays, reference=reference)
        return one.total / one.weight, one.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(values)
    assert float(value) == pytest.approx(found[name]["loss"], rel=1e-4)
    assert float(optax.tree.norm(gradient)) == pytest.approx(found[name]["grad_norm"], rel=1e-3)
    theirs = found[name]["metrics"]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert float(metrics[key].sum / metrics[key].count) == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key


def test_transformers_reads_a_reward_model_of_text(both, tmp_path):
    from transformers import AutoModelForSequenceClassification

    _, policy, _, processor, _, folder = both
    model = with_labels(policy, 1, seed=1)
    save_text(model, processor, tmp_path / "hf", base=folder / "policy")
    theirs = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "hf"), dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen2ForSequenceClassification"
    question = {"messages": [{"role": "user", "content": PAIRS[0][0]}, {"role": "assistant", "content": PAIRS[0][1]}]}
    ids = processor.encode(question).tokens
    with torch.no_grad():
        score = theirs(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, 0].item()
    assert RewardModel(model, processor).scores([question])[0] == pytest.approx(score, abs=1e-4)
