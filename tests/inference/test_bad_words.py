"""Words that may not come in an answer: as in transformers, for words of several tokens too."""

import numpy as np
import pytest

from jvlm.errors import UserError
from jvlm.inference.bad_words import BadWords, word_tokens
from jvlm.inference.engine import Engine
from jvlm.inference.requests import Request, SamplingParams
from tests.inference.support import MEDIA, oracle_tokens, prompt

NEW = 8
EXAMPLE = prompt("what is in the picture?")


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(tiny.model, tiny.processor)


def _answer(engine, tiny, words, **sampling):
    example = tiny.processor.encode(EXAMPLE, generation_prompt=True)
    params = SamplingParams(max_tokens=NEW, bad_words=words, ignore_eos=True, **sampling)
    events = list(engine.run([Request("one", example, params)]))
    assert events[-1].error is None, events[-1].error
    return [event.token for event in events]


def _texts(tiny, tokens, count):
    """Return (texts, their tokens) of so many tokens in a row of an answer that the tokenizer would give back."""
    tokenizer, found = tiny.processor.tokenizer, []
    for first in range(len(tokens) - count + 1):
        piece = tokens[first : first + count]
        text = tokenizer.decode(piece)
        if tokenizer.encode(text, add_special_tokens=False) == piece:
            found.append(text)
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_bad_word_does_not_come_as_in_transformers(engine, tiny, count):
    free = _answer(engine, tiny, ())
    words = _texts(tiny, free, count)
    assert words, "no text of the answer has these tokens again"
    words = words[:1]
    # ids that jvlm never gives are bad words there, so that both choose among the same
    never = [[tiny.config[m]] for m in MEDIA]
    never += [[i] for i in range(len(tiny.processor.tokenizer), tiny.config["vocab_size"])]
    theirs = [*map(list, word_tokens(words, tiny.processor.tokenizer)), *never]
    expected = oracle_tokens(tiny, EXAMPLE, NEW, bad_words_ids=theirs, eos_token_id=None)
    found = _answer(engine, tiny, tuple(words))
    assert found == expected
    assert found != free


def test_words_have_the_tokens_of_both_places(tiny):
    tokenizer = tiny.processor.tokenizer
    found = word_tokens(["red", " red", "red"], tokenizer)
    assert found == tuple(
        dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("red", " red"))
    )


def test_it_is_told_where_nothing_is_left():
    rule = BadWords([(1,), (2, 3)], np.array([0b1110], np.int32))
    bits = np.zeros(1, np.int32)
    rule.fill(bits)
    assert bits[0] == 0b1100
    rule.accept(2)
    rule.fill(bits)
    assert bits[0] == 0b0100
    rule.rollback(1)
    rule.fill(bits)
    assert bits[0] == 0b1100
    with pytest.raises(UserError, match="forbids every token"):
        BadWords([(31,)], np.array([-(2**31)], np.int32)).fill(bits)


@pytest.mark.parametrize("words", ["red", [""], [3]])
def test_what_is_no_list_of_texts_is_refused(words):
    with pytest.raises(UserError, match=r"sampling\.bad_words"):
        SamplingParams(bad_words=words)
