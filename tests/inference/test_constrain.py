"""Answers under a grammar: what may come, what may not, and grammars that are refused."""

import json
import random
import re

import numpy as np
import pytest

from jvlm.data import box_formats
from jvlm.data.box_formats import Detection
from jvlm.data.boxes import Box, Point, Sizes
from jvlm.errors import UserError
from jvlm.inference.box_grammar import box_grammar, range_pattern
from jvlm.inference.constrain import (
    Constraints,
    GrammarChecker,
    GrammarError,
    fill_drafts,
    forced,
    pack_bits,
    unpack_bits,
)
from jvlm.inference.grammar_text import grammar_text
from jvlm.inference.requests import Grammar
from jvlm.inference.thinking import ThinkingBudget

WIDTH, HEIGHT = 640, 480
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def constraints(tiny):
    vocabulary = tiny.config["vocab_size"]
    banned = np.zeros(vocabulary, bool)
    banned[len(tiny.processor.tokenizer) :] = True
    found = Constraints(tiny.processor, vocabulary, [tiny.config["eos_token_id"]], banned)
    yield found
    found.close()


def ids(constraints, text):
    return constraints.processor.tokenizer.encode(text, add_special_tokens=False)


def allowed(constraints, constraint):
    words = np.zeros(constraints.words, np.int32)
    constraint.fill(words)
    return np.flatnonzero(unpack_bits(words, constraints.vocab_size)).tolist()


def takes(constraints, grammar, text):
    """Whether a text is an answer: each of its tokens may come, and an end after the last."""
    constraint = constraints.start(grammar)
    for token in ids(constraints, text):
        if token not in allowed(constraints, constraint):
            return False
        constraint.accept(token)
    return bool(constraints.ends.intersection(allowed(constraints, constraint)))


def walk(constraints, grammar, seed, most=400):
    """A random answer; None if it did not end. Ends are taken where they may be."""
    rng, constraint, tokens = random.Random(seed), constraints.start(grammar), []
    while len(tokens) < most:
        found = allowed(constraints, constraint)
        ends = constraints.ends.intersection(found)
        if ends:
            return constraints.text(tokens)
        tokens.append(rng.choice(found))
        constraint.accept(tokens[-1])
    return None


def boxes_grammar(size=(WIDTH, HEIGHT)):
    return Grammar("boxes", image_size=size)


def test_random_answers_under_a_schema_are_json_of_the_schema(constraints):
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    for seed in range(10):
        value = json.loads(walk(constraints, grammar, seed))
        assert set(value) == {"colour", "count"}
        assert value["colour"] in ("red", "blue")
        assert 0 <= value["count"] <= 99


@pytest.mark.parametrize("pattern", [r"(yes|no)\.", r"[0-9]{2}-[a-c]+!"])
def test_random_answers_under_an_expression_match_it(constraints, pattern):
    for seed in range(5):
        assert re.fullmatch(pattern, walk(constraints, Grammar("regex", pattern), seed))


def test_an_answer_is_one_of_the_choices_whatever_characters_they_have(constraints):
    choices = ("yes", 'no "way" \\', "né\nlá", "three")
    grammar = Grammar("choice", choices=choices)
    assert all(takes(constraints, grammar, choice) for choice in choices)
    assert not takes(constraints, grammar, "yes, ")
    assert {walk(constraints, grammar, seed) for seed in range(20)} <= set(choices)


@pytest.mark.parametrize(
    "value", ['start: "a" ("b" | "c")+ "d"', 'root ::= "a" ("b" | "c")+ "d"'], ids=["lark", "ebnf"]
)
def test_grammars_of_both_notations_are_followed(constraints, value):
    assert takes(constraints, Grammar("lark", value), "abcbd")
    assert not takes(constraints, Grammar("lark", value), "ad")
    assert re.fullmatch("a[bc]+d", walk(constraints, Grammar("lark", value), 1))


@pytest.mark.parametrize("schema", ["{}", "true"])
def test_an_empty_schema_is_any_object(constraints, schema):
    for grammar in (Grammar("json_schema", schema), Grammar("json_object")):
        assert takes(constraints, grammar, '{"a": [1, {"b": null}]}')
        assert not takes(constraints, grammar, "12")


def test_blanks_between_tokens_end(constraints):
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    forms = [
        '{"colour":"red","count":7}',
        '{"colour": "red", "count": 7}',
        '{\n\t"colour": "red",\n\t"count": 7\n}',
        '{\n  "colour": "red",\n  "count": 7\n}',
    ]
    assert all(takes(constraints, grammar, form) for form in forms)
    assert not takes(constraints, grammar, "{" + " " * 7 + '"colour": "red", "count": 7}')
    own = Grammar("json_schema", json.dumps({**SCHEMA, "x-guidance": {"whitespace_pattern": " *"}}))
    with pytest.raises(UserError, match="x-guidance"):
        constraints.start(own)


@pytest.mark.parametrize("most", [0, 7, 9, 10, 99, 100, 101, 640, 999, 1000, 4095])
def test_the_pattern_of_a_range_has_its_numbers_and_no_others(most):
    pattern = re.compile(range_pattern(most))
    assert [n for n in range(12_000) if pattern.fullmatch(str(n))] == list(range(most + 1))
    assert not pattern.fullmatch("01")


@pytest.mark.parametrize("form", sorted(box_formats.FORMATS))
def test_what_a_model_is_taught_to_write_is_in_the_grammar_of_boxes(constraints, form):
    space = box_formats.FORMATS[form].space
    right, low = (WIDTH, HEIGHT) if space == "resized" else (999, 999)
    given = [Detection("the cat", Box(12, 0, right, 78, space)), Detection("dog 2", Point(3, low, space))]
    special = {t.content for t in constraints.processor.tokenizer.added_tokens_decoder.values() if t.special}
    text = box_formats.render_named(given, form)
    grammar = Grammar("lark", box_grammar(form, (WIDTH, HEIGHT), special_tokens=special))
    assert takes(constraints, grammar, text)
    assert not takes(constraints, grammar, text.replace(str(right), str(right + 1)))
    assert not takes(constraints, grammar, text.replace("12", "-12"))
    assert not takes(constraints, grammar, text.replace("78", "78.5"))


def test_random_boxes_are_read_back_within_their_picture(constraints):
    sizes = Sizes((64, 48), (64, 48))
    count = 0
    for seed in range(8):
        text = walk(constraints, boxes_grammar((64, 48)), seed, most=300)
        if text is None:
            continue
        numbers = box_formats.parse_numbers(text, constraints.processor.config.box_format)
        for item in numbers:
            assert all(0 <= v <= sizes.resized[i % 2] and v == int(v) for i, v in enumerate(item.values))
        count += len(numbers)
    assert count


def test_pretty_printed_and_bare_lists_of_boxes_are_taken(constraints):
    item = '{"bbox_2d": [1, 2, 3, 4], "label": "a \\"cat\\""}'
    for text in (f"[{item}]", f"```json\n[\n\t{item},\n\t{item}\n]\n```", "[]", f"[{item.replace(', ', ',')}]"):
        assert takes(constraints, boxes_grammar(), text), text
    assert not takes(constraints, boxes_grammar(), "[" + item)


def test_ends_come_only_where_the_grammar_is_satisfied_and_banned_tokens_never(constraints):
    constraint = constraints.start(Grammar("regex", "(ab)+"))
    for i in range(6):
        found = allowed(constraints, constraint)
        assert constraints.ends.intersection(found) == (constraints.ends if i and not i % 2 else set())
        assert max(found) < len(constraints.processor.tokenizer)
        constraint.accept(ids(constraints, "ab"[i % 2])[0])


def test_a_token_that_may_not_come_is_an_error_and_never_free_text(constraints):
    constraint = constraints.start(Grammar("regex", "ab"))
    with pytest.raises(GrammarError):
        constraint.accept(ids(constraints, "z")[0])
    with pytest.raises(GrammarError):
        allowed(constraints, constraint)


@pytest.mark.parametrize("after", [None, "</think>"])
def test_tokens_taken_back_leave_the_constraint_as_it_was(constraints, after):
    rng = random.Random(5)
    grammar = Grammar("json_schema", json.dumps(SCHEMA), after=after)
    constraint, masks, tokens = constraints.start(grammar), [], []
    opening = ids(constraints, "hm</think>\n") if after else []
    for step in range(25):
        found = allowed(constraints, constraint)
        if constraints.ends.intersection(found):
            break
        masks.append(found)
        tokens.append(opening[step] if step < len(opening) else rng.choice(found))
        constraint.accept(tokens[-1])
    assert len(masks) > len(opening) + 3
    for count in (1, 3, len(tokens) - 4):
        constraint.rollback(count)
        at = len(tokens) - count
        for mask, token in zip(masks[at:], tokens[at:], strict=True):
            assert allowed(constraints, constraint) == mask
            constraint.accept(token)


def test_a_grammar_that_comes_after_the_thinking_leaves_it_free(constraints):
    grammar = Grammar("choice", choices=("yes", "no"), after="</think>")
    constraint = constraints.start(grammar)
    for token in ids(constraints, "is it red? no."):
        found = allowed(constraints, constraint)
        assert token in found
        assert not constraints.ends.intersection(found)
        constraint.accept(token)
    for token in ids(constraints, "</think>") + ids(constraints, "\n\n"):
        assert token in allowed(constraints, constraint)
        constraint.accept(token)
    assert ids(constraints, "three")[0] not in allowed(constraints, constraint)
    for token in ids(constraints, "yes"):
        assert token in allowed(constraints, constraint)
        constraint.accept(token)
    assert set(allowed(constraints, constraint)) == constraints.ends


def test_masks_of_drafts_are_those_of_one_token_after_another(constraints):
    grammar = Grammar("regex", "[ab]{2,5}c")
    constraint, alone = constraints.start(grammar), constraints.start(grammar)
    drafts = [ids(constraints, c)[0] for c in "abzb"]
    words = np.zeros((5, constraints.words), np.int32)
    assert fill_drafts(constraint, words, drafts) == 2
    for i in range(3):
        expected = np.zeros(constraints.words, np.int32)
        alone.fill(expected)
        np.testing.assert_array_equal(words[i], expected)
        if i < 2:
            alone.accept(drafts[i])
    again = np.zeros(constraints.words, np.int32)
    constraint.fill(again)
    np.testing.assert_array_equal(again, words[0])


def test_thinking_ends_when_its_budget_is_spent_in_one_answer_only(constraints):
    closing = ids(constraints, "</think>")
    inner = constraints.start(Grammar("choice", choices=("yes", "no"), after="</think>"))
    budget = ThinkingBudget(constraints.free, constraints.end_bits, closing, 3, inner)
    other = ThinkingBudget(constraints.free, constraints.end_bits, closing, 100)
    thought = ids(constraints, "a")[0]
    for _ in range(3):
        assert thought in allowed(constraints, budget)
        budget.accept(thought)
        other.accept(thought)
    for token in closing:
        assert allowed(constraints, budget) == [token]
        assert len(allowed(constraints, other)) > 100
        budget.accept(token)
    assert not budget.is_thinking
    assert other.is_thinking
    assert ids(constraints, "z")[0] not in allowed(constraints, budget)
    budget.rollback(len(closing))
    assert allowed(constraints, budget) == [closing[0]]


def test_thinking_that_ends_by_itself_is_left_alone(constraints):
    closing = ids(constraints, "</think>")
    budget = ThinkingBudget(constraints.free, constraints.end_bits, closing, 50)
    for token in [*ids(constraints, "a b"), *closing]:
        assert not constraints.ends.intersection(allowed(constraints, budget))
        budget.accept(token)
    assert not budget.is_thinking
    assert constraints.ends <= set(allowed(constraints, budget))


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (Grammar("json_schema", '{"$ref": "http://169.254.169.254/x"}'), "only references that begin with #"),
        (Grammar("json_schema", '{"items": [{"$ref": "other.json"}]}'), "only references that begin with #"),
        (Grammar("lark", 'start: %json {"$ref": "http://x/y"}'), "only references that begin with #"),
        (Grammar("json_schema", "[" * 40 + "]" * 40), "must be an object"),
        (Grammar("json_schema", '{"items":' * 40 + "{}" + "}" * 40), "more than 32 levels"),
        (Grammar("json_schema", '{"items":' * 9000 + "{}" + "}" * 9000), "at most 65536|more than 32"),
        (Grammar("json_schema", "nonsense"), "not JSON"),
        (Grammar("json_schema", '{"type": 5}'), "cannot be used"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "cannot be used"),
        (Grammar("regex", "(" * 40 + ")" * 40), "more than 32 levels"),
        (Grammar("regex", "(a+"), "cannot be used"),
        (Grammar("regex", "a" * 70_000), "at most 65536"),
        (Grammar("lark", "start: nowhere"), "cannot be used"),
        (Grammar("choice"), "list of texts"),
        (Grammar("boxes"), "needs image_size"),
    ],
)
def test_bad_grammars_are_refused_and_the_next_good_one_is_taken(constraints, grammar, problem):
    with pytest.raises(UserError, match=problem):
        constraints.check(grammar)
    constraints.check(Grammar("json_schema", json.dumps(SCHEMA)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "problem"), [({"seconds": 0.005}, "takes more than 0.005 s"), ({"memory": 2**20}, "too much memory")]
)
def test_a_grammar_that_takes_too_much_is_refused_and_its_process_replaced(constraints, limits, problem):
    properties = {f"p{i}": {"type": "string", "pattern": f"[a-{'xyz'[i % 3]}]{{1,{i + 1}}}"} for i in range(1000)}
    large = Grammar("json_schema", json.dumps({"type": "object", "properties": properties}))
    with GrammarChecker() as checker:
        checker.check(grammar_text(large, constraints.processor))
    with GrammarChecker(**limits) as checker:
        with pytest.raises(UserError, match=problem):
            checker.check(grammar_text(large, constraints.processor))
        assert checker.schedule(None).result() == ""


def test_bits_are_packed_from_the_lowest_on():
    flags = np.random.default_rng(0).random(77) < 0.5
    words = pack_bits(flags)
    assert words.dtype == np.int32
    assert [bool(int(words[i // 32]) >> (i % 32) & 1) for i in range(77)] == flags.tolist()
    np.testing.assert_array_equal(unpack_bits(words, 77), flags)
    forced(words, 63)
    assert np.flatnonzero(unpack_bits(words, 77)).tolist() == [63]
