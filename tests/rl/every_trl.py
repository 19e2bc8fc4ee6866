"""Two updates of TRL's GRPO trainer with answers of our engine, in its own environment: `make test-exports`.

A text model, because TRL's trainers run it without a vision processor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvlm.data.processor import Processor
from jvlm.data.tokenizers import load_tokenizer
from jvlm.families.composed.reward_text import text_model
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Request, SamplingParams
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.rl.config import AdvantageConfig, RolloutConfig
from jvlm.rl.log_probs import banned_ids
from jvlm.rl.loop import sampled_groups
from jvlm.rl.losses import PolicyLoss
from jvlm.rl.old_log_probs import OldLogProbs
from jvlm.rl.packing import Shape, packed_answers
from jvlm.rl.records import AnswerRecord, GroupRecord
from jvlm.rl.task import PolicyTask
from jvlm.rl.weighing import weigh
from jvlm.training.hooks import Hook
from jvlm.training.starting_model import random_model
from jvlm.training.trainer import Trainer
from jvlm.weights import backbones
from tests.preference.support import write_text_model

QUESTIONS = ("what color is the circle?", "is there a cat?", "count the objects.")
ANSWERS, LONGEST, RATE = 4, 12, 0.02
PPO = {"kind": "ppo", "ratio_low": 0.8, "ratio_high": 1.2}
CASES = {
    "grpo": (PolicyLoss(**PPO, normalise="sequence"), {}),
    "dapo": (PolicyLoss(kind="ppo", ratio_low=0.8, ratio_high=1.28, normalise="batch"), {}),
    "dr_grpo": (PolicyLoss(**PPO, normalise="constant", constant_length=LONGEST), {"estimator": "mean", "eps": 0.0}),
    "gspo": (PolicyLoss(kind="gspo", ratio_low=1 - 3e-4, ratio_high=1 + 4e-4, normalise="sequence"), {}),
    "two_sided": (PolicyLoss(**PPO, normalise="batch", ratio_cap=1.5), {}),
}


def load(folder: Path):
    config = text_model(folder, Precision(compute_dtype="float32"))
    return backbones.fill(random_model(config, 0, None), [folder])


def rollouts(model, processor) -> tuple[list, list[GroupRecord]]:
    """(prompts, groups with rewards), the answers drawn by the engine."""
    config = EngineConfig(
        max_slots=ANSWERS * len(QUESTIONS),
        max_model_len=64,
        page_size=64,
        prefill_tokens=(64,),
        decode_slots=(ANSWERS * len(QUESTIONS),),
        prefix_cache=False,
        logprobs="sampled",
    )
    engine = Engine(model, processor, config)
    prompts = [
        processor.encode({"messages": [{"role": "user", "content": question}]}, generation_prompt=True)
        for question in QUESTIONS
    ]
    drawn = {(n, j): [] for n in range(len(prompts)) for j in range(ANSWERS)}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=1.0, n=ANSWERS, max_tokens=LONGEST, logprobs=0, seed=3, number=number * ANSWERS
        )
        engine.submit(Request(str(number), prompt, params))
    while engine.has_work:
        for event in engine.step():
            drawn[int(event.request_id), event.index].append((event.token, event.logprob.logprob))
    drawn[0, 0] = drawn[0, 0][:5]  # lengths differ
    drawn[1, 2] = drawn[1, 2][:1]
    rewards = np.random.default_rng(0).random((len(prompts), ANSWERS)).round(3)
    groups = []
    for n, prompt in enumerate(prompts):
        answers = []
        for j in range(ANSWERS):
            tokens, values = zip(*drawn[n, j], strict=True)
            zeros = (0,) * len(tokens)
            answers.append(AnswerRecord(tokens, values, zeros, zeros, "", "stop", reward=float(rewards[n, j])))
        groups.append(GroupRecord(n, n, "", "text", 0, False, prompt.length, tuple(answers)))
    return prompts, groups


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder, what TRL found, processor, prompts, groups)."""
    folder = tmp_path_factory.mktemp("trl")
    write_text_model(folder / "policy", 0)
    model = load(folder / "policy")
    processor = Processor(load_tokenizer(folder / "policy"), model.config)
    prompts, groups = rollouts(model, processor)
    given = [
        {
            "ids": [int(token) for token in prompt.tokens],
            "answers": [{"ids": list(map(int, one.tokens)), "reward": one.reward} for one in group.answers],
        }
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    (folder / "rollouts.json").write_text(json.dumps(given))
    packages = Path(sys.prefix) / "export-trl"
    environment = {**os.environ, "PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("rollouts_in_trl.py"))]
    command += [str(folder / "policy"), str(folder / "rollouts.json"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in CASES:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (folder / "policy" / file).is_file():
                shutil.copy(folder / "policy" / file, folder / name)
    return folder, json.loads((folder / "found.json").read_text()), processor, prompts, groups


@pytest.mark.parametrize("name", CASES)
def test_two_updates_are_those_of_trl(both, name):
    """The first has ratios of 1; in the second the loss clips some of them."""
    folder, found, _, prompts, groups = both
    loss, advantage = CASES[name]
    advantage = AdvantageConfig(**{"eps": 1e-4, **advantage})
    task = PolicyTask(
        policy_loss=loss,
        advantage=advantage,
        rollout=RolloutConfig(answers=ANSWERS, max_tokens=LONGEST, slots=ANSWERS),
        old_log_probs="trainer",
    )
    model = load(folder / "policy")
    weighed = weigh(groups, advantage, loss, LONGEST)
    shape = Shape(2, 256, 0, None, None, 3 * 2 * 14 * 14, model.config.encoder.position_values)
    nothing = banned_ids(np.zeros((2, model.config.decoder.vocab_size), bool))  # TRL's distribution has all tokens
    batches = packed_answers(sampled_groups(groups, prompts, weighed), shape, nothing)
    accumulation = len(batches)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((accumulation, *x.shape), x.dtype), batches[0].policy)
    before = {path: np.asarray(v.get_value()) for path, v in vlm.variables(model).items()}
    trainer = Trainer(
        model, task, optax.sgd(RATE), batches=shapes, is_trainable=lambda path, _: path.startswith("decoder.")
    )
    OldLogProbs(task).fill(trainer, batches)
    losses = []

    class Notes(Hook):
        def on_step_end(self, trainer, result):
            losses.append({n: float(result.metrics[n]) for n in ("loss", "grad_norm", "clip_low", "clip_high")})

    trainer.hooks = (Notes(),)
    trainer.fit(iter(batches * 2), steps=2)
    theirs = {path: np.asarray(v.get_value()) for path, v in vlm.variables(load(folder / name)).items()}
    ours = {path: np.asarray(value) for path, value in trainer.state.trainable.items()}
    largest = max(float(jnp.abs(theirs[path] - before[path]).max()) for path in ours)
    assert largest > 1e-4
    for path, value in ours.items():
        rows = min(len(value), len(theirs[path]))
        assert np.abs(value[:rows] - theirs[path][:rows]).max() < 1e-4 * largest, path
    for own, line in zip(losses, found[name], strict=True):
        assert own["loss"] == pytest.approx(line["loss"], abs=2e-4)  # TRL rounds what it logs to four places
        assert own["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
