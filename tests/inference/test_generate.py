"""Answers against transformers' own generation loop, and what the public functions promise."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

import jvlm
from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.inference.generate import engine_for, stream
from jvlm.weights import hf
from tests.inference.support import MEDIA, oracle_tokens, prompt
from tests.support import picture

NEW = 10
EXAMPLES = {
    "text": prompt("what is the answer?"),
    "longer text": prompt("where is the cat on the chair? " * 6),
    "smallest picture": prompt("<image>what is it?", images=[picture(56, 56)]),
    "wide picture": prompt("what is in <image> this picture?", images=[picture(252, 140)]),
    "resized picture": prompt("<image>what is it?", images=[picture(333, 187)]),
    "three pictures": prompt(
        "<image>is the <image>cat in both?<image>", images=[picture(84, 112), picture(140, 56, 1), picture(112, 112, 2)]
    ),
    "two turns": {
        "messages": [
            {"role": "system", "content": "You are MiMo."},
            {"role": "user", "content": "<image>what is it?"},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "and <image> this?"},
        ],
        "images": [picture(112, 84), picture(84, 140, 3)],
    },
}


def tokens_of(tiny, examples, **options):
    """Token ids of each example's answer."""
    found = [[] for _ in examples]
    options = {"max_new_tokens": NEW} | options
    jvlm.generate(tiny.model, tiny.processor, examples, on_token=lambda i, t: found[i].append(t), **options)
    return found


@pytest.fixture(scope="module")
def expected(tiny):
    return [oracle_tokens(tiny, example, NEW) for example in EXAMPLES.values()]


def test_greedy_tokens_of_a_mixed_batch_equal_transformers_one_by_one(tiny, expected):
    assert tokens_of(tiny, list(EXAMPLES.values()), batch_size=8) == expected
    assert len({tuple(e) for e in expected}) >= len(EXAMPLES) - 1


def test_greedy_tokens_of_an_example_alone_equal_transformers(tiny, expected):
    assert tokens_of(tiny, [EXAMPLES["text"]]) == expected[:1]


def test_greedy_tokens_with_a_tied_head_and_one_kv_head_equal_transformers(tiny_tied):
    examples = [EXAMPLES["text"], EXAMPLES["wide picture"]]
    assert tokens_of(tiny_tied, examples) == [oracle_tokens(tiny_tied, example, NEW) for example in examples]


def test_greedy_tokens_under_repetition_penalty_equal_transformers(tiny):
    examples = [EXAMPLES["longer text"]]
    found = tokens_of(tiny, examples, repetition_penalty=1.5)
    assert found == [oracle_tokens(tiny, example, NEW, repetition_penalty=1.5) for example in examples]
    assert found != tokens_of(tiny, examples)


def test_answers_come_in_the_order_of_the_examples_whatever_the_batches(tiny):
    examples = [prompt("yes " * n) for n in (3, 1, 2)]
    texts = [jvlm.generate(tiny.model, tiny.processor, examples, max_new_tokens=4, batch_size=n) for n in (1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] == [tiny.processor.decode(oracle_tokens(tiny, example, 4)) for example in examples]


def test_a_final_assistant_turn_is_answered_anew(tiny, expected):
    example = {
        **EXAMPLES["text"],
        "messages": [*EXAMPLES["text"]["messages"], {"role": "assistant", "content": "a red circle"}],
    }
    assert tokens_of(tiny, [example]) == expected[:1]


def test_no_examples_give_no_answers(tiny):
    assert jvlm.generate(tiny.model, tiny.processor, []) == []


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(tiny, expected):
    stop = expected[0][3]
    settings = {"max_new_tokens": NEW, "stop_token_ids": (stop,)}
    (found,) = tokens_of(tiny, [EXAMPLES["text"]], **settings)
    assert found == expected[0][: expected[0].index(stop) + 1]
    assert jvlm.generate(tiny.model, tiny.processor, [EXAMPLES["text"]], **settings) == [
        tiny.processor.decode(found[:-1])
    ]


def test_the_checkpoints_end_tokens_stop_by_default(tiny, expected, monkeypatch):
    monkeypatch.setitem(tiny.processor.generation, "eos_token_id", [expected[0][2], 7])
    assert tokens_of(tiny, [EXAMPLES["text"]]) == [expected[0][:3]]


def test_media_tokens_and_ids_beyond_the_tokenizer_are_never_generated(tiny):
    examples = [prompt(f"question {i}") for i in range(4)]
    found = np.concatenate(tokens_of(tiny, examples, temperature=1000.0, max_new_tokens=64, stop_token_ids=()))
    assert found.max() < len(tiny.processor.tokenizer)
    assert not np.isin(found, [tiny.config[name] for name in MEDIA]).any()
    assert len(set(found.tolist())) > 150


def test_sampled_answers_depend_on_seed_and_example_and_not_on_the_batches(tiny):
    examples = [EXAMPLES["text"]] * 4
    settings = {"temperature": 1.5, "seed": 3}
    found = tokens_of(tiny, examples, **settings)
    assert len({tuple(f) for f in found}) == 4
    assert tokens_of(tiny, examples, batch_size=1, **settings) == found
    assert tokens_of(tiny, examples, **(settings | {"seed": 4})) != found


def test_streamed_pieces_join_up_to_the_answer(tiny):
    example = EXAMPLES["text"]
    pieces = list(stream(tiny.model, tiny.processor, example, max_new_tokens=NEW))
    assert "".join(pieces) == jvlm.generate(tiny.model, tiny.processor, [example], max_new_tokens=NEW)[0]
    assert len(pieces) > 1


def test_a_bad_example_is_named_by_its_place_in_the_list(tiny):
    with pytest.raises(ExampleError, match=r"conversation 1, field 'images'"):
        jvlm.generate(tiny.model, tiny.processor, [EXAMPLES["text"], prompt("<image>no picture")])


@pytest.mark.parametrize(("name", "value"), [("temprature", 1.0), ("beams", 4)])
def test_an_unknown_sampling_field_is_refused(tiny, name, value):
    with pytest.raises(TypeError, match=name):
        jvlm.generate(tiny.model, tiny.processor, [EXAMPLES["text"]], **{name: value})


@pytest.mark.parametrize("one", [EXAMPLES["text"], "what?"])
def test_one_conversation_in_place_of_a_list_is_refused(tiny, one):
    with pytest.raises(UserError, match="give a list of them"):
        jvlm.generate(tiny.model, tiny.processor, one)


def test_a_batch_size_of_zero_is_refused(tiny):
    with pytest.raises(UserError, match="batch_size is 0"):
        jvlm.generate(tiny.model, tiny.processor, [EXAMPLES["text"]], batch_size=0)


def test_changed_parameters_are_used_at_once_and_compile_nothing(tiny):
    model = hf.load_weights(tiny.folder, tiny.model.config)
    head = model.decoder.head.kernel

    def answer():
        return jvlm.generate(model, tiny.processor, [EXAMPLES["text"]], max_new_tokens=NEW)

    before, engine = answer(), engine_for(model, tiny.processor)
    compiled = engine.compilations
    head[...] = jnp.flip(head[...], axis=1)
    assert answer() != before
    head[...] = jnp.flip(head[...], axis=1)
    assert answer() == before
    assert engine_for(model, tiny.processor) is engine
    assert engine.compilations == compiled


def test_the_engine_dies_with_its_model(tiny):
    model, processor = jvlm.load(tiny.folder)
    engine = weakref.ref(engine_for(model, processor))
    del model
    gc.collect()
    assert engine() is None
