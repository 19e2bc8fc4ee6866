"""Questions about pictures in general, most of them with options."""

from __future__ import annotations

from jvlm.evaluation.files import Row, hub, tsv
from jvlm.evaluation.items import LETTERS, content, key, letter_of, options_of
from jvlm.evaluation.task import Decoding, Item, Task

LETTER = "Answer with the option's letter from the given choices directly."


def mmmu_item(row: Row) -> Item:
    """Return a question of MMMU, with options or open; images stand where the text names them."""
    options = options_of(row, ("options",))
    names = tuple(f"image_{number}" for number in range(1, 8)) if row.form == "hub" else ("image",)
    is_open = row.get("question_type") == "open" or not options or row.get("answer") == "?"
    text = row.text("question")
    if not is_open:
        text += "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    golds = row.list("answer") if is_open else []
    gold = [str(one) for one in golds] if is_open else letter_of(row, row.need("answer"), options)
    answer = gold[0] if isinstance(gold, list) else gold
    name = key(row, "id", "index")
    subject = name.removeprefix("validation_").rpartition("_")[0] or str(row.get("category", default=""))
    return Item(
        name,
        content(row, text, images=names),
        gold,
        {"options": [] if is_open else options},
        answer,
        categories={"subject": subject, "kind": "open" if is_open else "choice"},
    )


mmmu_val = Task(
    name="mmmu_val",
    group="general",
    files=(
        hub("MMMU/MMMU", "*/validation-*.parquet"),
        hub("lmms-lab/MMMU", "data/validation-*.parquet"),
        tsv("MMMU_DEV_VAL"),
    ),
    item=lambda row: mmmu_item(row) if row.get("split", default="validation") == "validation" else None,
    metric="mmmu",
    instruction="Answer with the option's letter from the given choices directly, or with a single word or phrase.",
    boxed="Answer the question with option letter from given choices. Put your final answer within \\boxed{}.",
    decoding=Decoding(max_new_tokens=1024),
    judge="answer",
    published={"MiMo-VL-7B-RL": 66.7, "MiMo-VL-7B-SFT": 64.6, "Qwen2.5-VL-7B": 58.6},
    paper="arXiv 2311.16502",
)

TASKS = (mmmu_val,)
