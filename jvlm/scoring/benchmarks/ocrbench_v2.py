"""OCRBench v2 (arXiv 2501.00321): a score for each of its thirty kinds of questions."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.data.box_formats import parse_numbers
from jvlm.data.boxes import Box, iou
from jvlm.scoring.extras import require
from jvlm.scoring.score import Score
from jvlm.scoring.trees import Tree, distance, markdown_table, nodes, rows_tree, table, teds

_SEPARATORS = ("", ".", ". ", ",", ", ", "\u3001", ";", "; ", " ", "\u548c")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
_MARKS = "!?.:,*\"()\u00b7[]/'"
PAGES = frozenset(("full-page OCR en", "full-page OCR cn", "fine-grained text recognition en", "text translation cn"))


def score(text: str, kind: str, facts: Mapping[str, Any], golds: Sequence[Any]) -> Score:
    """Return the score of an answer, from 0 to 1.

    Args:
      kind: the question's, as the files name it ("table parsing en").
      facts: "question"; "eval" ("multiple choice", "case sensitive", "regression", ...); "bbox" and "content".
    """
    method = str(facts.get("eval") or "")
    if kind in PAGES:
        return _share(page(text, str(golds[0])), text)
    if kind.startswith("formula recognition"):
        return Score.of(_formula(text, golds, bare=kind.endswith("cn")), text[:200])
    if kind.startswith("table parsing"):
        return _table(text, str(golds[0]), str(facts.get("question") or ""), chinese=kind.endswith("cn"))
    if kind.startswith("document parsing"):
        return _share(document(text, str(golds[0])), text)
    if kind.startswith("key information"):
        return _key_information(text, golds[0])
    readers = {
        "chart parsing en": lambda: _chart(text, golds[0]),
        "text grounding en": lambda: _box(text, golds),
        "VQA with position en": lambda: _answer_and_box(text, golds, facts),
        "text spotting en": lambda: _spotted(text, facts),
        "text counting en": lambda: _counted(text, golds, method),
        "handwritten answer extraction cn": lambda: _handwritten(text, str(golds[0]), str(facts.get("question") or "")),
    }
    if kind in readers:
        return readers[kind]()
    if method == "multiple choice":
        return Score.of("".join(filter(str.isalpha, text)) == str(golds[0]), text[:200])
    if method != "case sensitive" and kind.endswith("cn"):
        return _share(_held(text, golds, spaces=False), text)
    return _share(_held(text, golds, case=method == "case sensitive"), text)


def _share(value: float, text: str) -> Score:
    return Score(float(value), "ok" if value == 1 else "wrong", text[:200])


def _held(text: str, golds: Sequence[Any], *, case: bool = False, spaces: bool = True) -> float:
    """Return 1 if a short reference is part of the answer; for longer ones their likeness, from one half on."""
    levenshtein = require("rapidfuzz.distance").Levenshtein

    def plain(value: Any) -> str:
        value = str(value).strip().replace("\n", " ")
        value = value if case else value.lower()
        return value if spaces else value.replace(" ", "")

    given, best = plain(text), 0.0
    for gold in map(plain, golds):
        if (len(gold.split()) < 5) if spaces else (len(gold.split(",")) < 4):
            best = max(best, float(gold in given))
        else:
            like = levenshtein.normalized_similarity(given, gold)
            best = max(best, like if like >= 0.5 else 0.0)
    return best


def _counted(text: str, golds: Sequence[Any], method: str) -> Score:
    if method != "regression":
        return Score.of(any(str(gold).lower().strip() in text for gold in golds), text[:200])
    found = re.search(r"\d+", text)
    if not found or len(found[0]) > 9:
        return Score(0.0, "unparsed")
    number, best = int(found[0]), 0.0
    for gold in golds:
        near = 1 - abs(number - int(gold)) / int(gold) if number > 0 and int(gold) else 0.0
        best = max(best, near if near > 0.5 else 0.0)
    return Score(best, "ok" if best == 1 else "wrong", number)


def _formula(text: str, golds: Sequence[Any], *, bare: bool) -> bool:
    def plain(value: str) -> str:
        value = re.sub(r"\\text\{([^{}]*)\}", r"\1", value) if bare else value
        return "".join(value.split())

    return any(plain(str(gold)) in plain(text) for gold in golds)


def _handwritten(text: str, gold: str, question: str) -> Score:
    if "\u7b80\u7b54" in question:
        return _share(page(text, gold), text)
    return Score.of(any(separator.join(gold) in text for separator in _SEPARATORS), text[:200])


def page(text: str, gold: str) -> float:
    """Return the mean of BLEU, METEOR, the F measure of the sets of words, and one less the share of edits.

    Words are those between white space; of texts in Chinese, which the authors' code cuts by a dictionary, single
    characters. METEOR is without synonyms, whose dictionary does not come with the library.
    """
    if not text.strip() or not gold.strip():
        return 0.0
    translate = require("nltk.translate")
    levenshtein = require("rapidfuzz.distance").Levenshtein
    chinese = bool(_CHINESE.search(gold) or _CHINESE.search(text))
    expected, given = ([c for c in one if not c.isspace()] if chinese else one.split() for one in (gold, text))
    weights = tuple(1 / 4 for _ in range(4))
    smooth = translate.bleu_score.SmoothingFunction().method0
    bleu = _quiet(lambda: translate.bleu_score.sentence_bleu([expected], given, weights, smooth))
    meteor = translate.meteor_score.single_meteor_score(expected, given, wordnet=_NoSynonyms())
    common = len(set(expected) & set(given))
    f_measure = 2 * common / (len(set(expected)) + len(set(given)))
    edits = levenshtein.distance(text, gold) / max(len(text), len(gold))
    return (float(bleu) + float(meteor) + f_measure + 1 - edits) / 4


class _NoSynonyms:
    """Stands for WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _quiet(make):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of answers that share no run of words with the reference, which is told here
        return make()


def _table(text: str, gold: str, question: str, *, chinese: bool) -> Score:
    if not chinese and "markdown" in question.lower():
        return _share(teds(markdown_table(text), markdown_table(gold)), text)
    given = table(
        text if "<table" in text else f"<table>{text[text.find('<body') :]}</table>" if "<body" in text else ""
    )
    expected = table(gold if "<table" in gold else f"<table>{gold}</table>")
    if given is None or expected is None:
        return Score(0.0, "unparsed")
    return _share(teds(given, expected), text)


def _chart(text: str, gold: Any) -> Score:
    given, expected = _mapping(text), gold if isinstance(gold, Mapping) else _mapping(str(gold))
    if not given or not expected:
        return Score(0.0, "unparsed")
    return _share(teds(_as_table(given), _as_table(expected)), text)


def _as_table(values: Mapping[Any, Any]) -> Tree:
    return rows_tree([(str(name), " ".join(str(value))) for name, value in values.items()])


def _mapping(text: str) -> dict[str, Any]:
    """Return the dictionary in an answer, of JSON or Python; empty where there is none. No text is run."""
    fenced = re.findall(r"```(?:python|json)?\n(.*?)\n```", text, re.DOTALL | re.IGNORECASE)
    content = max(fenced, key=len) if fenced else text
    content = content[content.find("{") : content.rfind("}") + 1]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(content)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict):
            return {str(name).strip(): value for name, value in found.items()}
    return {}


def _key_information(text: str, gold: Any) -> Score:
    """Return the mean over all keys of either: 1 where the answer's value is one of the reference's."""
    expected = gold if isinstance(gold, Mapping) else _mapping(str(gold))
    given = _mapping(text)
    if not given:
        return Score(0.0, "unparsed")

    def plain(value: Any) -> str:
        return "".join(str(value).lower().split())

    keys = set(given) | set(expected)
    right = 0
    for key in keys & set(given) & set(expected):
        values = expected[key] if isinstance(expected[key], list) else [expected[key]]
        right += plain(given[key]) in map(plain, values)
    return _share(right / len(keys), text)


def _iou(values: Sequence[float], gold: Sequence[Any]) -> float:
    x1, y1, x2, y2 = values
    if x1 > x2 or y1 > y2 or len(gold) != 4:
        return 0.0
    return iou(Box(x1, y1, x2, y2, "norm1000"), Box(*(float(value) for value in gold), "norm1000"))


def _box(text: str, gold: Sequence[Any]) -> Score:
    """Return the IoU of the only box, in thousandths as the question asks for."""
    found = {one.values for one in parse_numbers(text, "json_1000") if len(one.values) == 4}
    if len(found) != 1:
        return Score(0.0, "several_answers" if found else "unparsed")
    (values,) = found
    return Score(_iou(values, gold), "ok", list(values))


def _answer_and_box(text: str, golds: Sequence[Any], facts: Mapping[str, Any]) -> Score:
    given = _mapping(text)
    if not given:
        return Score(0.0, "unparsed")
    value = 0.5 * _held(str(given.get("answer", "")), golds) if "answer" in given else 0.0
    found = [one.values for one in parse_numbers(str(given.get("bbox", "")), "json_1000") if len(one.values) == 4]
    if len(found) == 1:
        value += 0.5 * _iou(found[0], facts.get("bbox") or ())
    return _share(value, text)


def _spotted(text: str, facts: Mapping[str, Any]) -> Score:
    """Return the F measure of words that are found: IoU above one half, and the same letters, case aside."""
    given = _words(text)
    expected = [
        ((min(box[0::2]), min(box[1::2]), max(box[0::2]), max(box[1::2])), str(word))
        for box, word in zip(facts.get("bbox_list") or (), facts.get("content") or (), strict=False)
    ]
    if not given or not expected:
        return Score(0.0, "unparsed" if not given else "wrong")
    wanted = [one for one in expected if one[1] != "###"]
    ignored = [box for box, word in expected if word == "###"]
    counted = [one for one in given if not any(_covered(one[0], box) > 0.5 for box in ignored)]
    left, right = list(wanted), 0
    for box, word in counted:
        match = next((one for one in left if _iou(box, one[0]) > 0.5 and _same_word(one[1], word)), None)
        if match is not None:
            left.remove(match)
            right += 1
    total = len(counted) + len(wanted)
    return _share(2 * right / total if total else 1.0, text)


def _covered(box: Sequence[float], other: Sequence[float]) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(width, 0) * max(height, 0) / area if area else 0.0


def _same_word(gold: str, word: str) -> bool:
    """Whether two words are the same, a mark at an end of the reference aside."""
    gold, word = gold.upper(), word.upper()
    forms = {gold, gold[1:] if gold[:1] in _MARKS else gold}
    forms |= {form[:-1] for form in tuple(forms) if form[-1:] and form[-1] in _MARKS}
    return word in forms


def _words(text: str) -> list[tuple[tuple[float, float, float, float], str]]:
    found = []
    for group in re.findall(r"[\[(]\s*([^\[\]()]*?)\s*[\])]", text):
        parts = group.split(",", 4)
        if len(parts) == 5 and all(part.strip().isdigit() and int(part) <= 1000 for part in parts[:4]):
            x1, y1, x2, y2 = (float(part) for part in parts[:4])
            if x1 < x2 and y1 < y2:
                found.append(((x1, y1, x2, y2), parts[4].strip().strip("\"'")))
    return list(dict.fromkeys(found))


def document(text: str, gold: str) -> float:
    """Return how alike two documents of Markdown are, as trees of titles with their lines; words do not count."""
    given, expected = _outline(text), _outline(gold)
    edits = distance(given, expected, lambda a, b: float(not a.split() or not b.split()))
    return max(1 - edits / max(nodes(given), nodes(expected)), 0.0)


def _outline(text: str) -> Tree:
    """Return the lines below their titles; those before the first title are below a title of their own."""
    parts: list[tuple[str, list[Tree]]] = [("TITLE", [])]
    for line in text.split("\n")[:1000]:
        line = re.sub(r"[*_]", " ", line)
        if line.startswith("#"):
            parts.append((line.replace("#", ""), []))
        else:
            parts[-1][1].append(Tree(line))
    return Tree("ROOT", tuple(Tree(title, tuple(lines)) for title, lines in parts))
