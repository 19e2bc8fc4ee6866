"""Adapters on the experts of a mixture, by the names of models: ``jvlm serve --enable-expert-lora`` as a process."""

import concurrent.futures
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvlm.adapters.merge import merge
from jvlm.adapters.peft_write import write_peft
from jvlm.cli import serve
from jvlm.errors import UserError
from jvlm.inference import token_rules
from tests.adapters.random_adapter import random_adapter
from tests.families.qwen3_vl import Tiny
from tests.server.process import MODEL, ServerProcess

TOKENS = 96
QUESTION = "what is the answer?"
SIZES = ("--max-model-len", "128", "--max-num-seqs", "3", "--max-num-batched-tokens", "32")
ON_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tokenizer_folder):
    return Tiny.create(tmp_path_factory.mktemp("experts"), tokenizer_folder, "qwen3_vl_moe", num_hidden_layers=2)


@pytest.fixture(scope="module")
def weights(experts):
    """One adapter on experts alone, and one on all matrices of the language model with an expert of a larger rank."""
    pattern = ((r".*experts\.gate_proj\.2", 5),)
    return {
        "cats": random_adapter(experts.model, 1, ON_EXPERTS, rank=3),
        "dogs": random_adapter(experts.model, 2, rank=2, rank_pattern=pattern),
    }


@pytest.fixture(scope="module")
def words(experts, weights, tmp_path_factory):
    """The options that name the adapters."""
    top = tmp_path_factory.mktemp("adapters")
    for name, one in weights.items():
        write_peft(one, experts.model.config, top / name)
    return ["--lora", *(f"{name}={top / name}" for name in weights), "--max-loras", "2"]


def tokens_of(answer):
    """The tokens of the prompt and of the answer."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    entries = body["choices"][0]["logprobs"]["content"]
    return body["prompt_token_ids"], [int(entry["token"].removeprefix("token_id:")) for entry in entries]


@pytest.mark.slow
def test_adapters_of_experts_and_the_base_answer_in_one_batch_as_each_merged_model(experts, weights, words):
    models = {MODEL: experts.model, **{name: merge(experts.model, one) for name, one in weights.items()}}
    fields = {"max_tokens": TOKENS, "ignore_eos": True, "logprobs": True}
    fields |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    together = 0.0
    with ServerProcess(experts.folder, *words, "--enable-expert-lora", sizes=SIZES) as server:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = {name: pool.submit(server.chat, QUESTION, model=name, **fields) for name in models}
            while not all(one.done() for one in asked.values()):
                together = max(together, server.metric("vllm:num_requests_running"))
        answers = {name: tokens_of(one.result()) for name, one in asked.items()}
        assert server.metric('jvlm:compilations_total{after_ready="true"') == 0
    assert together == 3
    assert len({tuple(answer) for _, answer in answers.values()}) == 3
    example = {"messages": [{"role": "user", "content": QUESTION}]}
    batch = experts.processor.pack([example], seq_len=128, max_patches=0)
    never, _ = token_rules.never_given(experts.model.config, experts.processor)
    likeliest = nnx.jit(lambda model, batch: jnp.where(never, -jnp.inf, model(batch)).argmax(-1))
    for name, (prompt, answer) in answers.items():
        assert len(answer) == TOKENS
        n = len(prompt) + len(answer)
        ids, segments, positions = (np.array(x) for x in (batch.tokens, batch.segment_ids, batch.positions))
        ids[0, :n], segments[0, :n], positions[0, :n] = prompt + answer, 1, np.arange(n)[:, None]
        whole = dataclasses.replace(batch, tokens=ids, segment_ids=segments, positions=positions)
        found = np.asarray(likeliest(models[name], whole))[0, len(prompt) - 1 : n - 1]
        assert found.tolist() == answer, name


def test_without_the_option_adapters_of_experts_are_refused_before_anything_is_compiled(experts, words):
    refusal = r"mlp\.down, and room is kept for decoder.*; --enable_expert_lora keeps it for experts"
    with pytest.raises(UserError, match=refusal):
        serve.run([str(experts.folder), *words])
