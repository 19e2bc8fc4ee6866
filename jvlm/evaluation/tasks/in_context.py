"""What is learnt from examples in the prompt alone: VL-ICL Bench (arXiv 2403.13164), whose mean MM1.5 reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jvlm.data.content import Text
from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Row, hub
from jvlm.evaluation.items import key
from jvlm.evaluation.task import Decoding, Item, Task

SHOTS = 4
_OPERATORS = ("+", "-", "x")
Demonstrate = Callable[[Item, Sequence[Row], np.random.Generator, int], list[Item]]


def _asked(row: Row, values: Mapping[str, Any], answer: Any, name: str) -> Item:
    """Return a question, or a demonstration, of images and a text."""
    images = Row(values, row.origin, row.form, row.media).images("image")
    text = str(values.get("question") or "")
    return Item(name, (*images, Text(text)), [str(answer)], answer=str(answer))


def _query(row: Row) -> Item:
    """Return a question; what its demonstrations depend on is in its facts."""
    item = _asked(row, row.values, row.need("answer"), key(row, "id", ""))
    kept = {name: row.get(name) for name in ("operator", "support", "classes") if row.get(name) is not None}
    return Item(item.id, item.content, item.gold, kept | {"media": row.media}, item.answer)


def _chosen(rows: Sequence[Row], rng: np.random.Generator, shots: int) -> list[Row]:
    if len(rows) < shots:
        raise ExampleError(rows[0].origin, "example", f"{len(rows)} records, not {shots}", "Give the whole file")
    return [rows[int(number)] for number in rng.permutation(len(rows))[:shots]]


def plain(item: Item, rows: Sequence[Row], rng: np.random.Generator, shots: int) -> list[Item]:
    """Return demonstrations that are drawn at random."""
    return [_asked(row, row.values, row.need("answer"), key(row, "id", "")) for row in _chosen(rows, rng, shots)]


def of_operator(item: Item, rows: Sequence[Row], rng: np.random.Generator, shots: int) -> list[Item]:
    """Return demonstrations whose answers are those of the question's operator."""
    place = _OPERATORS.index(str(item.facts["operator"]))
    found = _chosen(rows, rng, shots)
    return [_asked(row, row.values, row.need("answer")[place], key(row, "id", "")) for row in found]


def of_pairs(item: Item, rows: Sequence[Row], rng: np.random.Generator, shots: int) -> list[Item]:
    """Return demonstrations of both kinds: a pair that matches, and one that does not."""
    found = []
    for row in _chosen(rows, rng, shots):
        for kind in ("same", "diff"):
            values = row.need(kind)
            found.append(_asked(row, values, values["answer"], f"{key(row, 'id', '')}:{kind}"))
    return found


def of_names(item: Item, rows: Sequence[Row], rng: np.random.Generator, shots: int) -> list[Item]:
    """Return demonstrations of two made-up names, the question's and another, from the question's own record."""
    support, right = item.facts["support"], str(item.gold[0])
    others = sorted(str(name) for name in item.facts["classes"] if str(name) != right)
    names = [right, others[int(rng.integers(len(others)))]]
    if rng.integers(2):
        names.reverse()
    row = Row({}, rows[0].origin, rows[0].form, item.facts["media"])
    found = []
    for number in range(shots):
        for name in names:
            values = {"image": support[name]["images"][number], "question": "This is a"}
            found.append(_asked(row, values, name, f"{item.id}:{name}:{number}"))
    return found


def _task(name: str, metric: str, instruction: str, demonstrate: Demonstrate, support: str = "support") -> Task:
    return Task(
        f"vl_icl_{name}",
        "in-context",
        (hub("ys-zong/VL-ICL", f"{name}/query.json"),),
        _query,
        metric,
        instruction=instruction,
        decoding=Decoding(max_new_tokens=15),
        shots=SHOTS,
        demonstrations=(hub("ys-zong/VL-ICL", f"{name}/{support}.json"),),
        demonstrate=demonstrate,
        paper="arXiv 2403.13164",
        note="MM1.5 publishes the mean of the six, and not the number of examples: --shots changes it",
    )


_OPERATOR = "Find the operator that the examples before follow, and answer with the number that it gives."
TASKS = (
    _task("open_mi", "exact", "Answer with the name that the examples before give it.", of_names, "query"),
    _task("operator_induction", "count", _OPERATOR, of_operator),
    _task("operator_induction_interleaved", "count", _OPERATOR, of_operator),
    _task("clevr", "count", "Answer with the number, as the examples before count.", plain),
    _task("matching_mi", "yes_no", "Answer with yes or no, as the examples before do.", of_pairs),
    _task("textocr", "exact", "Answer with the text inside of the red box.", plain),
)
