"""Questions about documents, charts and text in pictures."""

from __future__ import annotations

import base64
from typing import Any

from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Files, Row, as_list, hub, official, tsv
from jvlm.evaluation.items import choice_item, content, key, letter_of, open_item
from jvlm.evaluation.task import Item, Task
from jvlm.evaluation.tasks.kinds import BRIEF, LETTER, LONG, SHORT, WITHOUT_JUDGE, choice, mimo

_PAGE = open_item(group=("docId", "ucsf_document_id", "image_local_name"))


def _pages(name: str, files: tuple[Files, ...], paper: str, published: dict[str, float], **changed: Any) -> Task:
    settings = {"instruction": SHORT, "decoding": BRIEF, "judge": "document", **changed}
    return Task(name, "document", files, _PAGE, "anls", published=published, paper=paper, **settings)


def _page_answer(row: Row) -> Item | None:
    """Return a question of VisualWebBench, one of seven kinds."""
    kind = row.text("task_type")
    box, answer = row.get("bbox"), row.need("answer")
    region = f" The red rectangle is at {box} as shares of the image." if box is not None else ""
    options = [str(one) for one in row.list("options", "choices")]
    listed = "\n".join(f"{chr(65 + n)}. {one}" for n, one in enumerate(options))
    asked = {
        "web_caption": "Write the description of this web page, as the content of its meta element of that name.",
        "heading_ocr": "Write the main text of this screenshot, which may be taken as its heading, and nothing else.",
        "webqa": f"{row.get('question')}\nAnswer in the fewest words possible.",
        "element_ocr": f"Write the text inside of the red rectangle of this screenshot.{region}",
        "element_ground": f"Which of the labelled elements is this: {row.get('elem_desc')}? Answer with its letter.",
        "action_prediction": f"What does the page show after a click into the red rectangle?{region}\n"
        f"{listed}\n{LETTER}",
        "action_ground": f"Which of the labelled elements is to be clicked for this: {row.get('instruction')}? "
        "Answer with its letter.",
    }
    if kind not in asked:
        return None
    gold: Any = [str(one) for one in row.list("answer")]
    if kind in ("element_ground", "action_prediction", "action_ground"):
        gold = letter_of(row, answer, options)
    facts = {"task_type": kind, "options": options}
    shown = content(row, asked[kind], images=("image",))
    return Item(f"{kind}:{key(row, 'id')}", shown, gold, facts, answer=str(gold), categories={"task_type": kind})


def _web_page(row: Row) -> Item | None:
    """Return a question of WebSRC; its images are base64."""
    image = row.need("image")
    data = base64.b64decode(image) if isinstance(image, str) else image
    read = open_item(ids=("id", "question_id"), parts=("domain",), group=("page_id",))
    return read(Row({**row.values, "image": data}, row.origin, row.form, row.media))


def _ocr(row: Row) -> Item:
    """Return a question of OCRBench."""
    golds = [str(one) for one in row.list("answer")]
    kind = row.text("question_type", "category")
    facts = {"formula": row.get("dataset") == "HME100k" or "handwritten mathematical" in kind.lower()}
    shown = content(row, row.text("question"))
    return Item(key(row, "index", ""), shown, golds, facts, golds[0], categories={"question_type": kind})


_V2_PARTS = {
    "text recognition": "recognition",
    "fine-grained text recognition": "recognition",
    "full-page OCR": "recognition",
    "text grounding": "detection",
    "VQA with position": "detection",
    "text spotting": "spotting",
    "key information extraction": "relations",
    "key information mapping": "relations",
    "handwritten answer extraction": "relations",
    "document parsing": "parsing",
    "chart parsing": "parsing",
    "table parsing": "parsing",
    "formula recognition": "parsing",
    "math QA": "calculation",
    "text counting": "calculation",
    "document classification": "understanding",
    "cognition VQA": "understanding",
    "diagram QA": "understanding",
    "reasoning VQA": "knowledge",
    "science QA": "knowledge",
    "APP agent": "knowledge",
    "ASCII art classification": "knowledge",
    "text translation": "knowledge",
}


def _ocr_v2(row: Row) -> Item:
    """Return a question of OCRBench v2; regions in it and in its answers are thousandths of the image."""
    kind, golds = row.text("type"), row.list("answers", "answer")
    name, _, language = kind.rpartition(" ")
    question = row.text("question")
    kept = {field: row.get(field) for field in ("eval", "bbox", "bbox_list", "content") if row.get(field) is not None}
    kept = {field: as_list(value) if field != "eval" else value for field, value in kept.items()}
    parts = {"part": f"{_V2_PARTS.get(name, name)} {language}", "type": kind, "language": language}
    shown = content(row, question, images=("image",))
    facts = {"kind": kind, "question": question, **kept}
    return Item(key(row, "id", "index", ""), shown, golds, facts, str(golds[0]) if golds else "", categories=parts)


def _figure(row: Row) -> Item | None:
    """Return CharXiv's question that needs reasoning about a figure."""
    read = open_item(
        question=("reasoning_q", "question"),
        answers=("reasoning_a", "answer"),
        ids=("figure_path", "index", ""),
        parts={"kind": "reasoning_q_source", "field": "category"},
    )
    return read(row)


def _charxiv(name: str, files: tuple[Files, ...], item: Any, instruction: str, published: dict[str, float]) -> Task:
    return Task(
        name,
        "document",
        files,
        item,
        "exact_document",
        instruction=instruction,
        decoding=LONG,
        judge="document",
        published=published,
        paper="arXiv 2406.18521",
        note=WITHOUT_JUDGE,
    )


def _statement(row: Row) -> Item | None:
    """Return a statement of TabFact, which a table entails (1, as its authors write it, or yes) or refutes."""
    label = row.text("label", "answer").lower()
    values = {"1": "yes", "entailed": "yes", "true": "yes", "0": "no", "refuted": "no", "false": "no"}
    answer = values.get(label, label)
    if answer not in ("yes", "no"):
        raise ExampleError(row.origin, "label", f"{label!r} is none of 1, 0, yes and no", "Copy the file again")
    return open_item(question=("statement", "question"))(
        Row({**row.values, "answer": answer, "answers": None}, row.origin, row.form, row.media)
    )


def _tables(
    name: str, metric: str, item: Any, instruction: str, published: dict[str, float], paper: str, fields: str
) -> Task:
    return Task(
        name,
        "document",
        (official(f"{name}_test.jsonl", media="images"),),
        item,
        metric,
        instruction=instruction,
        decoding=BRIEF,
        published=published,
        paper=paper,
        note=f"tables as pictures are everybody's own: give them with {fields} and image",
    )


TASKS = (
    _pages(
        "docvqa_val",
        (
            hub("lmms-lab/DocVQA", "DocVQA/validation-*.parquet"),
            tsv("DocVQA_VAL"),
            official("val_v1.0*.json", records="data"),
        ),
        "arXiv 2007.00398",
        {**mimo(95.7, 95.2, 95.5), "MM1.5-30B (test)": 91.4, "MM1.5-3B (test)": 87.7, "MM1.5-1B (test)": 81.0},
    ),
    _pages(
        "infovqa_val",
        (
            hub("lmms-lab/DocVQA", "InfographicVQA/validation-*.parquet"),
            tsv("InfoVQA_VAL"),
            official("infographicsVQA_val_v1.0*.json", records="data", media="infographicsvqa_images"),
        ),
        "arXiv 2104.12756",
        {**mimo(88.0, 87.2, 81.4), "MM1.5-30B (test)": 67.3, "MM1.5-3B (test)": 58.5},
    ),
    Task(
        "chartqa",
        "document",
        (
            hub("lmms-lab/ChartQA", "data/test-*.parquet"),
            tsv("ChartQA_TEST"),
            official("test/test_human.json", media="test/png"),
        ),
        lambda row: open_item(
            question=("question", "query"),
            answers=("answer", "label"),
            images=("image", "imgname"),
            ids=("index", ""),
            parts={"kind": "type" if row.form == "hub" else "split"},
        )(row),
        "relaxed",
        instruction=SHORT,
        decoding=BRIEF,
        judge="document",
        published={**mimo(91.7, 92.9, 90.2), "MM1.5-30B": 83.6, "MM1.5-3B": 74.2, "MM1-30B": 76.9},
        paper="arXiv 2203.10244",
    ),
    _charxiv(
        "charxiv_reasoning",
        (hub("princeton-nlp/CharXiv", "val*.parquet"), tsv("CharXiv_reasoning_val")),
        _figure,
        SHORT,
        mimo(56.5, 54.4, 42.5),
    ),
    _charxiv(
        "charxiv_descriptive",
        (tsv("CharXiv_descriptive_val"),),
        open_item(parts=("category", "qid")),
        "",
        mimo(86.8, 87.0, 73.9),
    ),
    choice(
        "seedbench_2_plus",
        "document",
        (hub("doolayer/SEED-Bench-2-Plus", "data/test-*.parquet"), tsv("SEEDBench2_Plus")),
        "arXiv 2404.16790",
        mimo(72.4, 71.9, 70.7),
        choice_item(parts={"kind": "question_image_type"}),
    ),
    Task(
        "ocrbench",
        "document",
        (hub("echo840/OCRBench", "data/test-*.parquet"), tsv("OCRBench")),
        _ocr,
        "ocrbench",
        decoding=BRIEF,
        judge="document",
        published={**mimo(86.6, 87.6, 89.7), "MM1.5-30B": 65.8, "MM1.5-3B": 65.7, "MM1-30B": 60.6},
        paper="arXiv 2305.07895",
    ),
    Task(
        "ocrbench_v2",
        "document",
        (hub("ling99/OCRBench_v2", "data/test-*.parquet"), tsv("OCRBench_v2")),
        _ocr_v2,
        "ocrbench_v2",
        boxed="",
        parser="spoken",
        decoding=LONG,
        paper="arXiv 2501.00321",
        note="METEOR, a fourth of the score of pages, is without synonyms; Chinese is cut into characters",
    ),
    Task(
        "visualwebbench",
        "gui",
        (hub("visualwebbench/VisualWebBench", "*/test-*.parquet"), hub("lmms-lab/VisualWebBench", "*/test-*.parquet")),
        _page_answer,
        "visualwebbench",
        decoding=BRIEF,
        summary="macro_task_type",
        published=mimo(80.2, 80.2, 72.9),
        paper="arXiv 2404.05955",
        note="the questions are in our words, not in those of its authors",
    ),
    Task(
        "websrc_val",
        "gui",
        (hub("rootsautomation/websrc", "data/dev-*.parquet"),),
        _web_page,
        "squad_f1",
        instruction=SHORT,
        decoding=BRIEF,
        published=mimo(95.3, 96.5, 94.6),
        paper="arXiv 2101.09465",
    ),
    Task(
        "textvqa",
        "document",
        (
            hub("lmms-lab/textvqa", "data/validation-*.parquet"),
            tsv("TextVQA_VAL"),
            official("TextVQA_0.5.1_val.json", records="data", media="train_images"),
        ),
        open_item(group=("image_id",)),
        "vqa",
        instruction=SHORT,
        decoding=BRIEF,
        published={"MM1.5-30B": 79.2, "MM1.5-3B": 76.5, "MM1.5-1B": 72.5, "Idefics2-8B": 73.0},
        paper="arXiv 1904.08920",
    ),
    _tables(
        "tabfact",
        "yes_no",
        _statement,
        "Does the table say so? Answer with yes or no.",
        {"MM1.5-30B": 84.0},
        "arXiv 1909.02164",
        "statement, label (1 or 0)",
    ),
    _tables("wtq", "table_answer", open_item(), SHORT, {"MM1.5-30B": 54.1}, "arXiv 1508.00305", "question, answers"),
)
