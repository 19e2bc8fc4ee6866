"""OCRBench v2's kinds of questions by hand, and trees of tables against distances that were worked out on paper."""

from __future__ import annotations

import pytest

from jvlm.scoring.benchmarks.ocrbench_v2 import document, page, score
from jvlm.scoring.trees import Tree, distance, markdown_table, nodes, table, teds

TWO = "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>"
WORDS = {
    "bbox_list": [[10, 10, 50, 10, 50, 30, 10, 30], [100, 10, 140, 10, 140, 30, 100, 30]],
    "content": ["Exit", "(A)"],
}


def _value(kind, text, golds, **facts):
    return score(text, kind, facts, golds).value


def test_the_distance_of_two_trees_is_the_published_one():
    """Zhang and Shasha's own example: f(d(a c(b)) e) and f(c(d(a b)) e) are two edits apart."""
    one = Tree("f", (Tree("d", (Tree("a"), Tree("c", (Tree("b"),)))), Tree("e")))
    other = Tree("f", (Tree("c", (Tree("d", (Tree("a"), Tree("b"))),)), Tree("e")))
    assert distance(one, other, lambda a, b: float(a != b)) == 2
    assert distance(one, one, lambda a, b: float(a != b)) == 0
    assert distance(Tree("x"), one, lambda a, b: float(a != b)) == 6
    assert nodes(one) == 6


@pytest.mark.parametrize(
    ("text", "similarity"),
    [
        (TWO, 1),
        (TWO.replace("<td>d</td>", ""), 1 - 1 / 6),
        (TWO.replace("d<", "e<"), 1 - 1 / 6),
        (TWO.replace("<td>a", "<td colspan=2>a"), 1 - 1 / 6),
        (TWO.replace("</td>", "").replace("</tr>", ""), 1),
        ("<table></table>", 1 - 6 / 6),
        ("<html><body><table><tr><td>a<td>b<tr><td>c<td>d", 1),
    ],
)
def test_tables_are_alike_by_their_trees(text, similarity):
    assert teds(table(text), table(TWO)) == pytest.approx(similarity)
    assert _value("table parsing en", f"Here:\n{text}", [TWO], question="Write it in HTML.") == pytest.approx(
        similarity
    )


def test_marks_in_a_cell_count_as_one_each():
    bold = table("<table><tr><td><b>ab</b></td></tr></table>")
    plain = table("<table><tr><td>ab</td></tr></table>")
    assert (nodes(bold), nodes(plain)) == (4, 3)
    assert teds(bold, plain) == pytest.approx(1 - (2 / 4) / 3)


def test_tables_of_markdown():
    gold = "| a | b |\n|---|---|\n| 1 | 2 |"
    assert teds(markdown_table(f"```markdown\n{gold}\n```"), markdown_table(gold)) == 1
    assert _value("table parsing en", gold.replace("2", "3"), [gold], question="in Markdown") == pytest.approx(
        1 - 1 / 6
    )
    assert score("no table", "table parsing cn", {"question": ""}, [TWO]).reason == "unparsed"


@pytest.mark.parametrize(
    ("kind", "text", "golds", "facts", "value"),
    [
        ("text recognition en", "It says Hello World.", ["hello world"], {}, 1),
        ("text recognition en", "It says Hello", ["hello"], {"eval": "case sensitive"}, 0),
        ("diagram QA en", "(B)", ["B"], {"eval": "multiple choice"}, 1),
        ("diagram QA en", "B or C", ["B"], {"eval": "multiple choice"}, 0),
        ("science QA en", "one two three four fiv", ["one two three four five"], {}, 22 / 23),
        ("cognition VQA cn", "\u5317 \u4eac\u5e02", ["\u5317\u4eac"], {}, 1),
        ("text counting en", "about 8 words", [10], {"eval": "regression"}, 0.8),
        ("text counting en", "20", [10], {"eval": "regression"}, 0),
        ("text counting en", "none", [10], {"eval": "regression"}, 0),
        ("text counting en", "there are 3", ["3"], {"eval": "exact match"}, 1),
        ("formula recognition en", "$x ^ 2 + 1$", ["x^2+1"], {}, 1),
        ("formula recognition cn", "\\text{\u5bbd}=2", ["\u5bbd = 2"], {}, 1),
        ("text grounding en", "[0, 0, 100, 100]", [0, 0, 100, 50], {}, 0.5),
        ("text grounding en", "[0, 0, 100, 50] or [0, 0, 100, 100]", [0, 0, 100, 50], {}, 0),
        ("VQA with position en", '{"answer": "red", "bbox": [0, 0, 10, 10]}', ["red"], {"bbox": [0, 0, 10, 5]}, 0.75),
        ("text spotting en", "[10,10,50,30,EXIT], [100,10,140,30,b]", [], WORDS, 0.5),
        ("text spotting en", "[(10, 10, 50, 30, 'Exit'), (100, 10, 140, 30, 'A)')]", [], WORDS, 1),
        ("key information extraction en", "{'a': '1', 'b': 'X y'}", ["{'a': ['2', '1'], 'b': ['xy']}"], {}, 1),
        ("key information mapping en", '{"a": "1", "c": "9"}', [{"a": ["1"], "b": ["2"]}], {}, 1 / 3),
        ("chart parsing en", "{'x': 1}", ["{'x': 1}"], {}, 1),
        ("chart parsing en", "__import__('os').abort()", ["{'x': 1}"], {}, 0),
        ("handwritten answer extraction cn", "A, C", ["AC"], {"question": ""}, 1),
    ],
)
def test_each_kind_has_its_own_rule(kind, text, golds, facts, value):
    assert _value(kind, text, golds, **facts) == pytest.approx(value)


def test_a_page_is_scored_by_four_measures():
    gold = "the quick brown fox jumps over the lazy dog"
    same = page(gold, gold)
    assert same == pytest.approx(1, abs=0.01)  # METEOR of the same nine words is a hair below 1
    assert page("something else altogether here now", gold) < 0.2
    assert page("", gold) == 0
    assert _value("full-page OCR cn", "\u4f60\u597d\u4e16\u754c", ["\u4f60\u597d\u4e16\u754c"]) == pytest.approx(
        1, abs=0.01
    )


def test_a_document_is_its_outline():
    gold = "# Title\nline\n# Second\nother"
    assert document(gold, gold) == 1
    assert document("# Title\nwords differ\n# Second\nother", gold) == 1
    assert document("# Title\nline", gold) == pytest.approx(1 - 2 / 6)
