"""Scores that are not finite end generation with an error that says where, and never with an answer."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jvlm
from jvlm import cli
from jvlm.data.examples import parse_example
from jvlm.errors import UserError
from jvlm.evaluation import score
from jvlm.inference.batch_file import generate_file
from jvlm.inference.chat import chat
from jvlm.inference.engine import Engine
from jvlm.inference.generate import complete, stream
from jvlm.inference.requests import EngineConfig, SamplingParams
from jvlm.inference.sampling import NOT_FINITE, SamplingArrays, SamplingConfig, sample
from jvlm.models import vlm
from tests import support
from tests.inference.support import prompt

EXAMPLE = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tensors(tiny):
    return support.random_tensors(support.tensor_shapes(tiny.config))


@pytest.fixture(scope="module")
def folder(tiny, tensors, tokenizer_folder, tmp_path_factory):
    """The tiny checkpoint with one NaN."""
    path = tmp_path_factory.mktemp("nan")
    support.write_folder(path, tokenizer_folder, tiny.config, limits=(4 * 784, 64 * 784))
    wrong = {**tensors, DOWN: tensors[DOWN].copy()}
    wrong[DOWN][3, 5] = np.nan
    support.write_tensors(path, wrong)
    return path


@pytest.fixture(scope="module")
def broken(folder):
    return jvlm.load(folder)


def _batch_file(model, processor, tmp_path):
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(EXAMPLE) + "\n" for _ in range(3)))
    generate_file(model, processor, tmp_path / "examples.jsonl", tmp_path / "out.jsonl", on_bad_example="skip")


def _chat(model, processor, tmp_path):
    lines = iter(["hi", "quit"])
    chat(model, processor, read=lambda _: next(lines))


DOORS = {
    "generate": lambda m, p, _: jvlm.generate(m, p, [EXAMPLE], max_new_tokens=4),
    "generate, sampled": lambda m, p, _: jvlm.generate(m, p, [EXAMPLE], max_new_tokens=4, temperature=1.0, top_p=0.9),
    "generate, penalised": lambda m, p, _: jvlm.generate(m, p, [EXAMPLE], max_new_tokens=4, repetition_penalty=1.2),
    "stream": lambda m, p, _: list(stream(m, p, EXAMPLE)),
    "batch file": _batch_file,
    "chat": _chat,
    "scores": lambda m, p, _: score.ask(m, p, [parse_example(EXAMPLE)]),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_nan_in_the_weights_ends_every_door_with_the_name_of_its_tensor(broken, tmp_path, door):
    with pytest.raises(UserError, match=rf"not finite numbers \(token 1 of the answer\)[\s\S]*{DOWN}: 1 of 5632 val"):
        DOORS[door](*broken, tmp_path)


@pytest.mark.parametrize("ahead", [False, True])
def test_it_is_noticed_as_well_where_steps_are_started_ahead(broken, ahead):
    model, processor = broken
    engine = Engine(model, processor, EngineConfig(ahead=ahead))
    example = processor.encode(EXAMPLE, generation_prompt=True)
    with pytest.raises(UserError, match="not finite numbers"):
        complete(engine, [example], SamplingConfig(max_new_tokens=4), request_ids=[0])


def test_the_command_line_ends_with_a_status_and_no_answer(folder, capsys):
    assert cli.main(["generate", "--model", str(folder), "--prompt", "hi", "--max_new_tokens", "4"]) == 2
    said = capsys.readouterr()
    assert DOWN in said.err
    assert "!" not in said.out


def test_the_request_is_named_and_finite_ones_before_it_are_answered(tiny):
    """A NaN in one token's embedding: only the request that has the token meets it."""
    token = int(tiny.processor.tokenizer.encode("z")[0])
    values = {path: v.get_value() for path, v in vlm.parameters(tiny.model).items()}
    values["decoder.embedding"] = values["decoder.embedding"].at[token].set(jnp.nan)
    model = vlm.bind(vlm.abstract(tiny.model.config), values)
    examples = [prompt("what is in the picture?"), prompt("a z here"), prompt("is there a dog?")]
    plain = jvlm.generate(tiny.model, tiny.processor, examples[:1], max_new_tokens=3)
    assert jvlm.generate(model, tiny.processor, examples[:1], max_new_tokens=3) == plain
    with pytest.raises(UserError, match=r"for conversation 1 are not[\s\S]*model\.embed_tokens\.weight: 64 of 22528"):
        jvlm.generate(model, tiny.processor, examples, max_new_tokens=3)


def test_an_overflow_of_finite_weights_is_said_to_be_one(tiny):
    values = {path: v.get_value() for path, v in vlm.parameters(tiny.model).items()}
    values["decoder.head.kernel"] = jnp.full_like(values["decoder.head.kernel"], 3e38)
    model = vlm.bind(vlm.abstract(tiny.model.config), values)
    with pytest.raises(UserError, match="all weights are, so this input overflows float32"):
        jvlm.generate(model, tiny.processor, [EXAMPLE], max_new_tokens=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"top_k": 1}])
def test_one_score_that_is_not_finite_is_enough_and_other_examples_keep_their_token(value, settings):
    logits = np.tile(np.arange(8, dtype=np.float32), (3, 1))
    logits[1, 2] = value
    params = [SamplingParams(**settings)] * 3
    arrays = SamplingArrays.of(params, range(3), range(3), [0] * 3)
    found = np.asarray(sample(jnp.asarray(logits), arrays, banned=np.zeros((2, 8), bool)))
    assert found[1] == NOT_FINITE
    assert (found[[0, 2]] >= 0).all()
