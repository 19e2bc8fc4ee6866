"""Questions in words alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvlm.data.content import Text
from jvlm.evaluation.files import Row, as_list, hub, official
from jvlm.evaluation.items import LETTERS, choice_item, key, open_item
from jvlm.evaluation.task import BOXED, Item, Task
from jvlm.evaluation.tasks.kinds import BOXED_LETTER, SAMPLED, mimo

_MATHS = f"Please reason step by step. {BOXED}"


def _science(row: Row) -> Item:
    """Return a question of GPQA; the order of its options follows from its words."""
    question = row.text("Question")
    texts = [row.text(name) for name in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))]
    seed = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")
    order = [int(n) for n in np.random.default_rng(seed).permutation(4)]
    options = [texts[n] for n in order]
    gold = LETTERS[order.index(0)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    parts = {"domain": str(row.get("High-level domain", default=""))}
    name = key(row, "Record ID")
    return Item(name, (Text(f"{question}\n{listed}"),), gold, {"options": options}, gold, categories=parts)


def _passage(row: Row) -> list[Item] | Item:
    """Return the questions of a passage of DROP, or a question of its snapshot."""
    if row.get("qa_pairs") is None:
        spans = [str(one) for one in row.need("answers_spans")["spans"]]
        golds = [[span] for span in dict.fromkeys(spans)]
        return _question(row.text("passage"), row.text("question"), golds, key(row, "query_id"), row.text("section_id"))
    found = []
    for pair in row.need("qa_pairs"):
        golds = [_spans(one) for one in (pair["answer"], *pair.get("validated_answers", ()))]
        golds = [gold for gold in golds if gold]
        found.append(_question(row.text("passage"), pair["question"], golds, pair["query_id"], row.text("key")))
    return found


def _spans(answer: Mapping[str, Any]) -> list[str]:
    """Return the spans of an answer of DROP: its spans, its number, or its date."""
    if answer.get("spans"):
        return [str(one) for one in answer["spans"]]
    if answer.get("number") not in (None, ""):
        return [str(answer["number"])]
    date = answer.get("date") or {}
    words = " ".join(str(date[name]) for name in ("day", "month", "year") if date.get(name))
    return [words] if words else []


def _question(passage: str, question: str, golds: list[list[str]], name: str, group: str) -> Item:
    return Item(name, (Text(f"{passage}\n{question}"),), golds, answer=", ".join(golds[0]), group=group)


def _instructions(row: Row) -> Item:
    """Return a prompt of IFEval with its instructions."""
    prompt = row.text("prompt")
    names, arguments = as_list(row.need("instruction_id_list")), as_list(row.need("kwargs"))
    gold = [{"id": name, "kwargs": given} for name, given in zip(names, arguments, strict=True)]
    return Item(key(row, "key"), (Text(prompt),), gold, {"prompt": prompt}, answer="")


def _competition(name: str, files, published: dict[str, float]) -> Task:
    return Task(
        name,
        "text",
        files,
        open_item(question=("problem", "Problem", "question"), answers=("answer", "Answer"), ids=("id", "ID", "")),
        "maths",
        instruction=_MATHS,
        boxed=_MATHS,
        decoding=SAMPLED,
        runs=32,
        published=published,
        paper="artofproblemsolving.com/wiki",
    )


TASKS = (
    Task(
        "gpqa_diamond",
        "text",
        (hub("Idavidrein/gpqa", "gpqa_diamond.csv"), official("gpqa_diamond.csv")),
        _science,
        "choice",
        instruction=BOXED_LETTER,
        boxed=BOXED_LETTER,
        decoding=SAMPLED,
        runs=8,
        published=mimo(58.3, 56.3, 30.3),
        paper="arXiv 2311.12022",
    ),
    Task(
        "supergpqa",
        "text",
        (hub("m-a-p/SuperGPQA", "SuperGPQA-all.jsonl"), hub("m-a-p/SuperGPQA", "data/train-*.parquet")),
        choice_item(answer=("answer_letter",), ids=("uuid",), parts=("discipline", "difficulty")),
        "choice",
        instruction=BOXED_LETTER,
        boxed=BOXED_LETTER,
        decoding=SAMPLED,
        published=mimo(44.3, 42.6, 25.4),
        paper="arXiv 2502.14739",
    ),
    Task(
        "drop",
        "text",
        (
            official("drop_dataset_dev.json", records="*"),
            hub("ucinlp/drop", "data/validation-*.parquet"),
        ),
        _passage,
        "drop_f1",
        version=2,
        instruction="Answer with the shortest possible words or number.",
        decoding=SAMPLED,
        shots=3,
        demonstrations=(
            official("drop_dataset_train.json", records="*"),
            hub("ucinlp/drop", "data/train-*.parquet"),
        ),
        published=mimo(85.1, 82.7, 67.6),
        paper="arXiv 1903.00161",
    ),
    Task(
        "mmlu_pro",
        "text",
        (hub("TIGER-Lab/MMLU-Pro", "data/test-*.parquet"),),
        choice_item(parts=("category",)),
        "choice",
        instruction=BOXED_LETTER,
        boxed=BOXED_LETTER,
        decoding=SAMPLED,
        published=mimo(64.8, 59.8, 48.7),
        paper="arXiv 2406.01574",
    ),
    Task(
        "ifeval",
        "text",
        (hub("google/IFEval", "ifeval_input_data.jsonl"), official("input_data.jsonl")),
        _instructions,
        "ifeval",
        boxed="",
        parser="spoken",
        decoding=SAMPLED,
        runs=8,
        published=mimo(75.9, 75.3, 75.1),
        paper="arXiv 2311.07911",
        note="prompt-level, strict",
    ),
    Task(
        "math500",
        "text",
        (hub("HuggingFaceH4/MATH-500", "test.jsonl"),),
        open_item(question=("problem",), answers=("answer",), ids=("unique_id",), parts=("subject", "level")),
        "maths",
        instruction=_MATHS,
        boxed=_MATHS,
        decoding=SAMPLED,
        published=mimo(95.4, 95.0, 83.0, size="72B"),
        paper="arXiv 2305.20050",
    ),
    _competition(
        "aime24",
        (
            hub("HuggingFaceH4/aime_2024", "data/train-*.parquet"),
            hub("Maxwell-Jia/AIME_2024", "aime_2024_problems.parquet"),
        ),
        mimo(67.5, 66.4, 16.7, size="72B"),
    ),
    _competition(
        "aime25",
        (hub("math-ai/aime25", "test.jsonl"), hub("yentinglin/aime_2025", "data/train-*.parquet")),
        mimo(52.5, 50.9, 10.8, size="72B"),
    ),
)
