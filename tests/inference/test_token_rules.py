"""What generation_config.json forbids is not generated, as in transformers; what is not done is named."""

import dataclasses

import numpy as np
import pytest

from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.generate import complete
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.token_rules import banned_tokens, token_rules
from tests.inference.support import MEDIA, oracle_tokens, prompt

NEW = 6
EXAMPLE = prompt("what is in the picture?")


@pytest.fixture(scope="module")
def plain(tiny):
    """transformers' greedy answer without rules: what a rule then forbids."""
    return oracle_tokens(tiny, EXAMPLE, NEW)


def _tokens(tiny, monkeypatch, generation):
    monkeypatch.setattr(tiny.processor, "generation", generation)
    engine = Engine(tiny.model, tiny.processor)
    example = tiny.processor.encode(EXAMPLE, generation_prompt=True)
    (found,) = complete(engine, [example], SamplingConfig(max_new_tokens=NEW), request_ids=[0])
    return list(found.tokens)


def _rules(plain, end):
    return {
        "suppress_tokens": {"suppress_tokens": [plain[0], plain[2]]},
        "one id to suppress": {"suppress_tokens": plain[1]},
        "bad words of one token": {"bad_words_ids": [[plain[0]], [plain[3]]]},
        "an end token as a bad word": {"bad_words_ids": [[end], [plain[1]]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [plain[0], plain[1]]},
        "all of them": {
            "suppress_tokens": [plain[2]],
            "bad_words_ids": [[plain[0]]],
            "begin_suppress_tokens": [plain[1], plain[3]],
        },
        "a forced first token": {"forced_bos_token_id": 5},
    }


@pytest.mark.parametrize("name", list(_rules([0] * 4, 0)))
def test_a_rule_holds_as_in_transformers(tiny, plain, monkeypatch, name):
    end = tiny.config["eos_token_id"]
    rules = _rules(plain, end)[name]
    never = [tiny.config[m] for m in MEDIA] + list(range(len(tiny.processor.tokenizer), tiny.config["vocab_size"]))
    also = rules.get("suppress_tokens", [])
    also = also if isinstance(also, list) else [also]
    # the oracle has a suppress_tokens of its own, for media and for ids without a token
    theirs = {k: v for k, v in rules.items() if k != "suppress_tokens"}
    theirs["bad_words_ids"] = [*theirs.get("bad_words_ids", []), *([t] for t in also)] or None
    expected = oracle_tokens(tiny, EXAMPLE, NEW, eos_token_id=[end], **theirs)
    found = _tokens(tiny, monkeypatch, {"eos_token_id": [end], **rules})
    assert found == expected
    assert (found != plain) == (name != "a forced first token")
    assert not set(found) & set(never)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_new_tokens": 4}, "min_new_tokens = 4"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id = 2"),
        ({"stop_strings": ["END"]}, "stop_strings"),
        ({"bad_words_ids": [[4], [5, 6]]}, r"bad_words_ids = \[\[5, 6\]\]"),
        ({"num_beams": 4, "guidance_scale": 1.5}, "guidance_scale = 1.5; num_beams = 4"),
    ],
)
def test_what_is_asked_for_and_not_done_is_named(tiny, monkeypatch, capsys, values, says):
    monkeypatch.setattr(tiny.processor, "generation", values)
    Engine(tiny.model, tiny.processor)
    assert any(says.replace("\\", "") in line for line in capsys.readouterr().err.splitlines())


def test_the_defaults_of_transformers_ask_for_nothing():
    from transformers import GenerationConfig

    assert token_rules(GenerationConfig().to_dict(), ()) == token_rules({}, ())
    quiet = {
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.9,
        "min_length": 0,
        "num_beams": 1,
        "guidance_scale": 1.0,
    }
    assert token_rules(quiet, ()).unsupported == ()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"suppress_tokens": ["a"]}, "suppress_tokens holds 'a'"),
        ({"begin_suppress_tokens": 1.5}, "begin_suppress_tokens holds 1.5"),
        ({"bad_words_ids": [3]}, "bad_words_ids is"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is"),
        ({"bad_words_ids": [[True]]}, "bad_words_ids holds True"),
        ({"suppress_tokens": list(range(352))}, "forbids every token"),
    ],
)
def test_a_rule_of_another_form_is_refused_by_name(tiny, monkeypatch, values, says):
    monkeypatch.setattr(tiny.processor, "generation", values)
    with pytest.raises(UserError, match=rf"generation_config\.json.*{says}"):
        Engine(tiny.model, tiny.processor)


def test_only_ids_without_a_token_are_banned_where_the_ids_have_a_hole(tiny):
    config = dataclasses.replace(tiny.model.config, eos_token_id=342)
    ids = {*range(320), *range(340, 349)}
    found = np.flatnonzero(~banned_tokens(config, ids, ()))
    assert set(found) == ids - set(config.media_token_ids)


def test_an_end_token_is_never_banned_for_want_of_a_token(tiny):
    config = dataclasses.replace(tiny.model.config, eos_token_id=(342, 350))
    assert not banned_tokens(config, 320, ())[[342, 350]].any()
