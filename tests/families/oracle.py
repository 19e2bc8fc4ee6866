"""What the tests of families compare with transformers on a random small checkpoint, `tests.support.Tiny`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jvlm
from jvlm.models.batch import PackedBatch
from jvlm.weights import table
from tests.support import Tiny

Example = dict[str, Any]
Inputs = Callable[[Tiny, Example], dict[str, Any]]


def user(text: str, answer: str = "it is the red circle.", **media: Any) -> Example:
    """An example of one question and one answer."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **media}


def several_turns(first: Any, second: Any) -> Example:
    """A system prompt, and a question about each of two images."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>what is it?"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "and <image> this?"},
        {"role": "assistant", "content": "a cat"},
    ]
    return {"messages": messages, "images": [first, second]}


def prompt_of(example: Example) -> Example:
    """The example up to its last answer."""
    return {**example, "messages": example["messages"][:-1]}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights at a scale where every one of them, norms and biases included, moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                noise = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
            elif "embed_tokens" not in name and "position_embedding" not in name:
                noise = noise / float(np.sqrt(np.prod(value.shape[1:])))
            value.copy_(noise)


def check_tokens_and_logits(
    tiny: Tiny, example: Example, shape: dict[str, int], inputs_of: Inputs, *, atol: float = 2e-4
) -> None:
    """Compare what one example becomes, and the logits of its tokens."""
    batch, inputs = tiny.processor.pack([example], **shape), inputs_of(tiny, example)
    n = int((batch.segment_ids > 0).sum())
    np.testing.assert_array_equal(batch.tokens[0, :n], inputs["input_ids"][0])
    with torch.no_grad():
        expected = tiny.torch_model(**inputs).logits.numpy()[0]
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, :n], expected, atol=atol)


def check_packed_equals_alone(tiny: Tiny, examples: Sequence[Example], shape: dict[str, int]) -> None:
    """Compare the logits of examples packed into one sequence with those of each alone."""
    together = tiny.processor.pack(examples, **shape)
    assert together.tokens.shape[0] == 1
    logits = np.asarray(tiny.model(together))[0]
    for number, example in enumerate(examples, 1):
        alone = np.asarray(tiny.model(tiny.processor.pack([example], **shape)))[0]
        inside = together.segment_ids[0] == number
        np.testing.assert_allclose(logits[inside], alone[: inside.sum()], atol=1e-4)


def cross_entropy(logits, batch):
    """Return the weighted sum over the supervised tokens of a packed batch."""
    targets = jnp.roll(jnp.asarray(batch.tokens), -1, 1)
    weights = jnp.roll(jnp.asarray(batch.loss_weights), -1, 1)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()


def torch_loss(tiny: Tiny, examples: Sequence[Example], batch: PackedBatch, inputs_of: Inputs) -> float:
    """Return transformers' loss of a packed sequence's examples, each alone; its gradients stay in the model."""
    tiny.torch_model.zero_grad()
    total = 0.0
    for number, example in enumerate(examples, 1):
        inside, inputs = batch.segment_ids[0] == number, inputs_of(tiny, example)
        weights = torch.from_numpy(batch.loss_weights[0, inside])[1:]
        logits = tiny.torch_model(**inputs).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], inputs["input_ids"][0, 1:], reduction="none")
        part = (each * weights).sum()
        part.backward()
        total += float(part.detach())
    return total


def check_gradients(
    tiny: Tiny,
    examples: Sequence[Example],
    shape: dict[str, int],
    inputs_of: Inputs,
    name_of: Callable[[str], str] = lambda name: name,
) -> None:
    """Compare the gradient of every tensor, of examples that are packed into one sequence here.

    Args:
      name_of: name of a stored tensor to that of transformers' parameter.
    """
    batch = tiny.processor.pack(examples, **shape)
    assert batch.tokens.shape[0] == 1
    loss, grads = nnx.jit(nnx.value_and_grad(lambda model, b: cross_entropy(model(b), b)))(tiny.model, batch)
    assert float(loss) == pytest.approx(torch_loss(tiny, examples, batch, inputs_of), rel=1e-5)
    flat = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(grads)}
    entries = table.entries(tiny.model.config, {p: tuple(v.shape) for p, v in flat.items()})
    expected = {name: parameter.grad.numpy() for name, parameter in tiny.torch_model.named_parameters()}
    assert {name_of(entry.name) for entry in entries} == set(expected)
    for entry in entries:
        value, wanted = flat[entry.path], expected[name_of(entry.name)]
        ours = entry.to_checkpoint(np.asarray(value if entry.layer is None else value[entry.layer]))
        error = np.linalg.norm(ours - wanted) / max(np.linalg.norm(wanted), 1e-3)
        assert error < 1e-3, (entry.name, error)


def check_greedy_answers(tiny: Tiny, examples: Sequence[Example], inputs_of: Callable[..., dict[str, Any]]) -> None:
    """Compare the tokens of greedy answers; neither side says what stands for media."""
    found: list[list[int]] = [[] for _ in examples]
    prompts = [prompt_of(example) for example in examples]
    options = {"max_new_tokens": 10, "batch_size": 4}
    jvlm.generate(tiny.model, tiny.processor, prompts, on_token=lambda i, t: found[i].append(t), **options)
    config, processor = tiny.model.config, tiny.processor
    never = [
        *config.media_token_ids,
        *processor.delimiter_ids,
        *range(len(processor.tokenizer), config.decoder.vocab_size),
    ]
    ends = [*config.end_token_ids, *processor.stop_ids]
    for prompt, tokens in zip(prompts, found, strict=True):
        inputs = inputs_of(tiny, prompt, generation_prompt=True)
        plain = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": never, "eos_token_id": ends}
        expected = tiny.torch_model.generate(**inputs, **plain)[0, inputs["input_ids"].shape[1] :].tolist()
        assert [t for t in tokens if t not in ends] == [t for t in expected if t not in ends]
