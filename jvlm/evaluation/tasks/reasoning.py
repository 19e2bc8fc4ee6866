"""Mathematics and logic with pictures."""

from __future__ import annotations

import math
from typing import Any

from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Files, Row, as_list, hub, official, tsv
from jvlm.evaluation.items import choice_item, content, key, letter_of, open_item, options_of
from jvlm.evaluation.task import Item, Task
from jvlm.evaluation.tasks.kinds import BOXED_LETTER, REASONING, mimo

_SOLVE = "Solve the problem, and put your final answer in \\boxed{}."


def _task(name: str, files: tuple[Files, ...], item: Any, metric: str, paper: str, **changed: Any) -> Task:
    settings = {"instruction": _SOLVE, "boxed": _SOLVE, "decoding": REASONING, **changed}
    return Task(name, "reasoning", files, item, metric, paper=paper, **settings)


def _problem(row: Row) -> Item:
    """Return a problem with options, or with an open answer where there are none (MathVision)."""
    if options_of(row):
        return choice_item(images=("decoded_image", "image"), parts=("subject", "level"))(row)
    return open_item(images=_picture(row), parts=("subject", "level"))(row)


def _picture(row: Row) -> tuple[str, ...]:
    """Return the field of the picture itself, where another one holds its path."""
    return ("decoded_image",) if row.get("decoded_image") is not None else ("image",)


def _mathvision(row: Row) -> Item:
    """Return a problem of MathVision."""
    shown = {**row.values, "image": row.get("decoded_image", "image"), "decoded_image": None}
    return _problem(Row(shown, row.origin, row.form, row.media))


def _mathverse(row: Row) -> Item | None:
    """Return a problem of MathVerse's part that is seen only."""
    if row.get("problem_version", default="Vision Only").replace("_", " ").lower() != "vision only":
        return None
    question = row.text("query_cot", "question_for_eval", "question")
    golds = [row.text("answer")]
    shown = content(row, question, images=("image",))
    kind = row.text("question_type")
    options = ["", "", "", ""] if kind == "multi-choice" else []
    gold: Any = letter_of(row, golds[0], ["A", "B", "C", "D"]) if options else golds
    name = key(row, "sample_index", "index")
    return Item(name, shown, gold, {"options": options}, golds[0], categories={"kind": kind})


def _dynamath(row: Row) -> Item:
    """Return a variant of a question of DynaMath; all variants of it belong together."""
    number = key(row, "id", "index")
    kind = row.text("answer_type")
    facts = {"answer_type": "multiple choice" if kind == "multiple choice" else kind}
    gold = row.text("ground_truth", "answer")
    if kind == "float":
        _number(row, "ground_truth", gold)
    variant = row.get("varid", "variant", default=key(row, "").split(":")[0])
    shown = content(row, row.text("question"), images=_picture(row))
    group = number if row.form == "hub" else str(row.get("id", "qid", default=number))
    parts = {
        "subject": str(row.get("subject", default="")),
        "level": str(row.get("level", "knowledge_level", default="")),
    }
    return Item(f"{number}:{variant}", shown, [gold], facts, gold, group=group, categories=parts)


def _wemath(row: Row) -> Item | None:
    """Return a question of WeMath: a composed problem of two or three steps, or one of its steps."""
    part = row.text("key")
    if part[:1] not in "23":
        return None  # problems of one step have no part in the strict score
    text = f"{row.text('question')}\n{row.text('option')}" if row.get("option") else row.text("question")
    gold = row.text("answer").strip("() ").upper()
    facts = {"options": [], "composed": part.endswith("multi")}
    shown = content(row, text, images=("image_path", "image"))
    name = row.text("ID")
    return Item(f"{name}:{part}", shown, gold, facts, gold, group=name, categories={"steps": part[:1]})


def _logic(row: Row) -> Item:
    """Return a question of LogicVista; some have several right letters."""
    letters = sorted({letter for letter in row.text("answer").upper() if letter.isalpha()})
    shown = content(row, row.text("question"), images=("image", "imagename", "imagesource"))
    skill = as_list(row.get("skill", default=""))
    gold = "".join(letters)
    name = key(row, "index", "key", "")
    return Item(name, shown, gold, {"options": []}, ", ".join(letters), categories={"skill": str(skill[0])})


def _mathvista(row: Row) -> Item:
    """Return a question of MathVista."""
    metadata = row.get("metadata", default={})
    metadata = metadata if isinstance(metadata, dict) else {}
    precision, options = row.get("precision"), [str(one) for one in row.list("choices")]
    facts = {
        "question_type": row.text("question_type"),
        "answer_type": row.text("answer_type"),
        "precision": None if str(precision) in ("None", "nan") else int(_number(row, "precision", precision)),
        "options": options,
    }
    parts = {name: str(metadata[name]) for name in ("task", "category", "grade") if metadata.get(name)}
    shown = content(row, row.text("query", "question"), images=_picture(row))
    answer = row.text("answer")
    if facts["answer_type"] in ("integer", "float") and not (facts["question_type"] == "multi_choice" and options):
        _number(row, "answer", answer.replace(",", ""))
    return Item(key(row, "pid", "index"), shown, [answer], facts, answer, categories=parts)


def _number(row: Row, field: str, value: Any) -> float:
    """Return a field's value as a number. Raises ExampleError for one that is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ExampleError(row.origin, field, f"{value!r} is no number", "Copy the file again, or mend the record")
    return found


def _olympiad(row: Row) -> Item | None:
    """Return a problem of OlympiadBench with a final answer; proofs are no part of it."""
    if row.get("final_answer", "answer") is None:
        return None
    names = tuple(f"image_{number}" for number in range(1, 10))
    text = row.text("question")
    if context := row.get("context"):
        text = f"{context}\n{text}"
    golds = [str(one) for one in row.list("final_answer", "answer")]
    parts = {name: str(row.get(name)) for name in ("subject", "language", "subfield") if row.get(name)}
    found = row.images(*names) or row.images("images", "image")
    plain = content(
        Row({"pictures": [one.source for one in found]}, row.origin, row.form, row.media), text, images=("pictures",)
    )
    return Item(key(row, ""), plain, golds, answer=golds[0], categories=parts)


TASKS = (
    _task(
        "olympiadbench",
        (
            hub("Hothan/OlympiadBench", "OlympiadBench/OE_*/*.parquet"),
            hub("lscpku/OlympiadBench-official", "all_no_proof/test-*.parquet"),
            hub("lscpku/OlympiadBench-official", "*/*.parquet"),
            tsv("OlympiadBench"),
        ),
        _olympiad,
        "maths",
        "arXiv 2402.14008",
        published=mimo(59.4, 59.4, 37.2, size="72B"),
        note="the tolerance of numerical answers (error) is not applied: they must be equal",
    ),
    _task(
        "mathvision",
        (hub("MathLLMs/MathVision", "data/test-*.parquet"), tsv("MathVision")),
        _mathvision,
        "maths_or_choice",
        "arXiv 2402.14804",
        published=mimo(60.4, 57.9, 38.1, size="72B"),
    ),
    _task(
        "mathverse_vision_only",
        (
            hub("AI4Math/MathVerse", "testmini*.parquet"),
            hub("CaraJ/MathVerse-lmmseval", "testmini_version_split/vision_only-*.parquet"),
            tsv("MathVerse_MINI_Vision_Only"),
        ),
        _mathverse,
        "maths_or_choice",
        "arXiv 2403.14624",
        judge="answer",
        published=mimo(71.5, 67.1, 57.6, size="72B"),
    ),
    _task(
        "dynamath",
        (hub("DynaMath/DynaMath_Sample", "data/*.parquet"), hub("kcz358/DynaMath", "data/*.parquet"), tsv("DynaMath")),
        _dynamath,
        "dynamath",
        "arXiv 2411.00836",
        summary="worst_case",
        published=mimo(45.9, 46.9, 38.1, size="72B"),
        note="the score needs all variants of a question: a part by --limit has another",
    ),
    _task(
        "wemath",
        (hub("We-Math/We-Math", "data/testmini-*.parquet"), tsv("WeMath")),
        _wemath,
        "choice",
        "arXiv 2407.01284",
        instruction=BOXED_LETTER,
        boxed=BOXED_LETTER,
        summary="wemath",
        published=mimo(66.3, 65.1, 50.6, size="72B"),
        note="the score needs all steps of a problem: a part by --limit has another",
    ),
    _task(
        "logicvista",
        (
            official("dataset.json", records="*", media="images"),
            hub("lscpku/LogicVista", "data/test-*.parquet"),
            tsv("LogicVista"),
        ),
        _logic,
        "choice",
        "arXiv 2407.04973",
        instruction=BOXED_LETTER,
        boxed=BOXED_LETTER,
        published=mimo(61.4, 61.2, 57.1, size="72B"),
    ),
    _task(
        "mathvista_testmini",
        (hub("AI4Math/MathVista", "data/testmini-*.parquet"), tsv("MathVista_MINI")),
        _mathvista,
        "mathvista",
        "arXiv 2310.02255",
        judge="answer",
        published={
            **mimo(81.5, 81.8, 74.8, size="72B"),
            "MM1.5-30B": 55.6,
            "MM1.5-3B": 44.4,
            "MM1-30B": 39.4,
            "Idefics2-8B": 51.4,
        },
    ),
)
