"""The policy task on a small model with pictures and a video: log-probabilities of the engine, gradient, sharing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Request, SamplingParams
from jvlm.models import vlm
from jvlm.rl.advantages import advantages
from jvlm.rl.config import RolloutConfig
from jvlm.rl.log_probs import banned_ids
from jvlm.rl.losses import PolicyLoss, token_weights
from jvlm.rl.old_log_probs import OldLogProbs
from jvlm.rl.packing import SampledAnswer, SampledGroup, Shape, draws_of, packed_answers, with_answer
from jvlm.rl.task import PolicyTask
from jvlm.training.hooks import Hook
from jvlm.training.trainer import Trainer
from tests.support import hf_inputs, picture

ANSWERS, TEMPERATURE = 3, 0.7
TASK = PolicyTask(rollout=RolloutConfig(answers=ANSWERS, temperature=TEMPERATURE, slots=ANSWERS))
SHAPE = Shape(2, 384, 768, 256, None, 3 * 2 * 14 * 14, 2)


def user(text, **media):
    return {"messages": [{"role": "user", "content": text}], **media}


EXAMPLES = (
    user("<image>where is the cat?", images=[picture(84, 56)]),
    user("<image><image>is it a dog?", images=[picture(56, 84, 1), picture(112, 84, 2)]),
    user("<video>describe this video.", videos=[[picture(56, 56, n) for n in range(4)]]),
    user("count the objects."),
)


@dataclasses.dataclass
class Sampled:
    """Groups of answers, and what the engine may not give."""

    groups: list[SampledGroup]
    banned: np.ndarray
    flags: np.ndarray


@pytest.fixture(scope="module")
def sampled(tiny):
    sizes = {"page_size": 64, "prefill_tokens": (256,), "decode_slots": (12,), "encode_patches": (256,)}
    config = EngineConfig(max_slots=12, max_model_len=256, prefix_cache=False, logprobs="sampled", **sizes)
    engine = Engine(tiny.model, tiny.processor, config)
    prompts = [tiny.processor.encode(example, generation_prompt=True) for example in EXAMPLES]
    params = SamplingParams(temperature=TEMPERATURE, n=ANSWERS, max_tokens=10, logprobs=0, seed=3)
    requests = [
        Request(str(number), prompt, dataclasses.replace(params, number=number * ANSWERS))
        for number, prompt in enumerate(prompts)
    ]  # the numbers of answers are those of `SampledAnswer` below
    drawn = {(n, j): ([], []) for n in range(len(prompts)) for j in range(ANSWERS)}
    for event in engine.run(requests):
        tokens, log_probs = drawn[int(event.request_id), event.index]
        tokens.append(event.token)
        log_probs.append(event.logprob.logprob)
    rewards = np.random.default_rng(0).random(len(drawn))
    numbers = np.repeat(np.arange(len(prompts)), ANSWERS)
    lengths = np.array([len(tokens) for tokens, _ in drawn.values()])
    values = advantages(rewards, numbers, lengths)
    weights = token_weights(lengths, numbers, TASK.policy_loss)
    groups = [
        SampledGroup(
            prompt,
            [
                SampledAnswer(*drawn[n, j], values[number], weights[number], None, params.seed, number)
                for j, number in enumerate(range(n * ANSWERS, (n + 1) * ANSWERS))
            ],
        )
        for n, prompt in enumerate(prompts)
    ]
    first = engine.banned if engine.banned_first is None else engine.banned_first
    flags = np.stack([engine.banned, first])
    return Sampled(groups, banned_ids(flags), flags)


def policies(groups, sampled, shape=SHAPE):
    return [one.policy for one in packed_answers(groups, shape, sampled.banned)]


def differences(task, model, batches):
    """Of each sampled token: trainer minus engine."""
    found = []
    log_probs = jax.jit(lambda batch: task.log_probs(model, batch)[0])
    for batch in batches:
        values = np.asarray(log_probs(batch))
        found.append((values - batch.rollout)[batch.weights > 0])
    return np.concatenate(found)


def test_log_probs_are_those_of_the_engine_for_pictures_and_video(tiny, sampled):
    """They differ by the rounding of float32 alone: the engine multiplies matrices of other shapes. Where a token's
    log-probability is near -5, one unit in the last place is 5e-7."""
    batches = policies(sampled.groups, sampled)
    found = differences(TASK, tiny.model, batches)
    assert len(found) == sum(len(answer.tokens) for group in sampled.groups for answer in group.answers)
    assert np.abs(found).max() < 5e-6
    assert (found == 0).mean() > 0.1
    assert abs(found.mean()) < 1e-6  # neither is larger than the other
    # what the comparison would see: another temperature, and no banned tokens
    hotter = dataclasses.replace(TASK, rollout=dataclasses.replace(TASK.rollout, temperature=1.0))
    assert np.abs(differences(hotter, tiny.model, batches)).max() > 1e-2
    free = [dataclasses.replace(batch, banned=np.full_like(batch.banned, -1)) for batch in batches]
    assert np.abs(differences(TASK, tiny.model, free)).max() > 1e-3


def test_log_probs_of_the_engine_are_those_of_transformers(tiny, sampled):
    import torch

    for example, group in zip(EXAMPLES, sampled.groups, strict=True):
        if "videos" in example:
            continue  # whose frames have no times here, as transformers wants them
        answer = group.answers[0]
        inputs = hf_inputs(tiny, example, generation_prompt=True)
        count = len(answer.tokens)
        for name, more in (("input_ids", list(answer.tokens)), ("mm_token_type_ids", [0] * count)):
            inputs[name] = torch.cat([inputs[name], torch.tensor([more], dtype=inputs[name].dtype)], 1)
        with torch.no_grad():
            logits = tiny.torch_model(**inputs).logits[0, -count - 1 : -1].double().numpy()
        logits[:, sampled.flags[0]] = -np.inf
        logits = logits / TEMPERATURE
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(answer.log_probs, expected[np.arange(count), list(answer.tokens)], atol=2e-4)


def test_answers_share_their_pictures(sampled):
    (batch,) = policies(sampled.groups[:1], sampled)
    assert (batch.packed.patch_segment_ids > 0).sum() == sampled.groups[0].prompt.num_patches
    indices = [batch.packed.vision_index[batch.packed.segment_ids == n] for n in (1, 2, 3)]
    assert all(set(one[one >= 0]) == set(indices[0][indices[0] >= 0]) for one in indices)


def gradient_of(task, model, batches):
    """Loss and gradient of a step of some micro-batches."""
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}

    @jax.jit
    def of_one(values, batch):
        def total(values):
            loss = task.loss(vlm.bind(model, values), batch)
            return loss.total, loss.weight

        (value, weight), gradient = jax.value_and_grad(total, has_aux=True)(values)
        return value, weight, gradient

    parts = [of_one(values, batch) for batch in batches]
    value, weight, gradient = jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs), *parts)
    assert float(weight) == 1
    return float(value), gradient


def test_the_trainer_draws_the_same_tokens_with_the_same_random_numbers(tiny, sampled):
    score = jax.jit(lambda batch, draws: TASK.score(tiny.model, batch, draws)[1])
    batches = packed_answers(sampled.groups, SHAPE, sampled.banned)
    for batch in batches:
        sampled_there = batch.policy.weights > 0
        draws = draws_of(batch)
        np.testing.assert_array_equal(np.asarray(score(batch.policy, draws)), sampled_there)
        other = np.asarray(score(batch.policy, dataclasses.replace(draws, seeds=draws.seeds + 1)))
        assert other[sampled_there].mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [4, 1])
def test_old_log_probs_are_those_of_the_step_to_the_last_bit(tiny, sampled, sequences):
    """With pictures and a video, in float32: what the trainer computes before the step, and the step itself."""
    task = dataclasses.replace(TASK, old_log_probs="trainer", policy_loss=PolicyLoss(kind="ppo"))
    batches = packed_answers(sampled.groups, dataclasses.replace(SHAPE, sequences=sequences), sampled.banned)
    accumulation = len(batches)
    assert (accumulation > 1) == (sequences == 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((accumulation, *x.shape), x.dtype), task.batch_of(batches[0]))
    model = vlm.bind(tiny.model, {p: jnp.copy(v.get_value()) for p, v in vlm.variables(tiny.model).items()})
    trainer = Trainer(model, task, optax.adamw(1e-3), batches=shapes)
    old = OldLogProbs(task)
    old.fill(trainer, batches)
    assert old.drawn_again == 1
    found = []

    class Notes(Hook):
        def on_step_end(self, trainer, result):
            found.append({name: float(value) for name, value in result.metrics.items() if value.ndim == 0})

    trainer.hooks = (Notes(),)
    trainer.fit(iter([*batches, *batches]), steps=2)
    first, second = found
    assert first["old/difference"] == 0
    assert first["old/equal"] == 1
    assert first["clip_low"] == first["clip_high"] == 0
    assert 0 < first["rollout/difference"] < 2e-6
    assert second["old/difference"] > 1e-4


@pytest.mark.slow
def test_packing_and_micro_batches_change_nothing(tiny, sampled):
    groups = sampled.groups
    value, gradient = gradient_of(TASK, tiny.model, policies(groups, sampled))
    alone = [
        SampledGroup(group.prompt, [answer]) for group in groups for answer in group.answers
    ]  # each with pictures of its own
    for shape in (dataclasses.replace(SHAPE, sequences=1), dataclasses.replace(SHAPE, sequences=4)):
        other, differing = gradient_of(TASK, tiny.model, policies(alone, sampled, shape))
        assert other == pytest.approx(value, abs=1e-6)
        for path, own in gradient.items():
            np.testing.assert_allclose(differing[path], own, atol=2e-5 * max(np.abs(own).max(), 0.1), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["on_policy", "gspo"])
def test_the_gradient_is_that_of_differences_of_the_objective(tiny, sampled, kind):
    """Of tokens and of sequences it is, on-policy, the gradient of the objective in float64 whose ratio is to the
    present policy. What each kind gives a token's log-probability is in test_losses.py."""
    loss = PolicyLoss(kind=kind, normalise="sequence" if kind == "gspo" else "group")
    task = dataclasses.replace(TASK, policy_loss=loss)
    groups = [SampledGroup(prompt, list(answers)) for prompt, answers in sampled.groups]
    batches = policies(groups, sampled, dataclasses.replace(SHAPE, sequences=4))
    values = {path: v.get_value() for path, v in vlm.variables(tiny.model).items()}
    log_probs = jax.jit(lambda values, batch: task.log_probs(vlm.bind(tiny.model, values), batch)[0])
    present = [np.asarray(log_probs(values, batch), np.float64) for batch in batches]
    batches = [dataclasses.replace(b, old=p.astype(np.float32)) for b, p in zip(batches, present, strict=True)]
    _, gradient = gradient_of(task, tiny.model, batches)

    def objective(values):
        total = 0.0
        for batch, old in zip(batches, present, strict=True):
            ratio = np.exp(np.asarray(log_probs(values, batch), np.float64) - old)
            total -= (batch.weights * batch.advantages * ratio).sum(dtype=np.float64)
        return total

    rng = np.random.default_rng(2)
    for tower in vlm.TOWERS:
        direction = {p: rng.standard_normal(v.shape) * p.startswith(tower) for p, v in values.items()}
        norm = np.sqrt(sum(np.square(d).sum() for d in direction.values()))
        slope = sum(float(np.vdot(gradient[p], d)) for p, d in direction.items())
        step = 3e-2 / norm
        at = {
            s: {p: v + jnp.asarray(s * step * direction[p], v.dtype) for p, v in values.items()} for s in (-2, -1, 1, 2)
        }
        ends = {s: objective(moved) for s, moved in at.items()}
        measured = (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * step)
        assert slope == pytest.approx(measured, rel=1e-2, abs=2e-4), tower


def test_an_answer_stands_behind_its_prompt(tiny):
    prompt = tiny.processor.encode(EXAMPLES[0], generation_prompt=True)
    example = with_answer(prompt, [5, 6, 7])
    assert example.length == prompt.length + 3
    assert (example.positions[-3:, 0] == prompt.positions.max() + 1 + np.arange(3)).all()
    assert example.loss_weights[-3:].tolist() == [1, 1, 1]
    assert not example.loss_weights[:-3].any()
