"""Questions about documents, charts and text in pictures."""

from __future__ import annotations

from jvlm.evaluation.files import hub, official, tsv
from jvlm.evaluation.items import open_item
from jvlm.evaluation.task import Decoding, Task

SHORT = "Answer the question using a single word or phrase."
_SHORT = Decoding(max_new_tokens=256)

docvqa_val = Task(
    name="docvqa_val",
    group="document",
    files=(
        hub("lmms-lab/DocVQA", "DocVQA/validation-*.parquet"),
        tsv("DocVQA_VAL"),
        official("val_v1.0*.json", records="data", media="spdocvqa_images"),
    ),
    item=open_item(group=("docId", "ucsf_document_id")),
    metric="anls",
    instruction=SHORT,
    decoding=_SHORT,
    judge="document",
    published={"MiMo-VL-7B-RL": 95.7, "MiMo-VL-7B-SFT": 95.2, "Qwen2.5-VL-7B": 95.5},
    paper="arXiv 2007.00398",
)

TASKS = (docvqa_val,)
