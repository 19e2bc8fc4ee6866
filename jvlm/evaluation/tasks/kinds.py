"""What tasks of the same kind have in common: words after questions, lengths of answers, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jvlm.evaluation.files import Files, Row
from jvlm.evaluation.items import choice_item
from jvlm.evaluation.task import Decoding, Item, Task

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
COUNT = "Answer with a single number."
# MiMo-VL's own
BOXED_COUNT = "Please count the objects by grounding. Put your answer in \\boxed{}."
BOXED_LETTER = "Answer the question with option letter from given choices. Put your final answer within \\boxed{}."

BRIEF = Decoding(max_new_tokens=256)
LONG = Decoding(max_new_tokens=1024)
REASONING = Decoding(max_new_tokens=32768)
SAMPLED = Decoding(max_new_tokens=32768, temperature=0.6, top_p=0.95)


def mimo(rl: float, sft: float, qwen: float | None = None, *, size: str = "7B") -> dict[str, float]:
    """Return MiMo-VL's published scores, and Qwen2.5-VL's as MiMo-VL's report gives them (arXiv 2506.03569)."""
    scores = {"MiMo-VL-7B-RL": rl, "MiMo-VL-7B-SFT": sft}
    return scores if qwen is None else scores | {f"Qwen2.5-VL-{size}": qwen}


WITHOUT_JUDGE = "without a judge only the same words count, and published scores do not compare with that"
Reader = Callable[[Row], Item | Sequence[Item] | None]


def choice(
    name: str,
    group: str,
    files: tuple[Files, ...],
    paper: str,
    published: Mapping[str, float],
    item: Reader | None = None,
    **changed: Any,
) -> Task:
    """Return a task of multiple choice."""
    settings = {"instruction": LETTER, "boxed": BOXED_LETTER, "decoding": LONG, **changed}
    return Task(name, group, files, item or choice_item(), "choice", published=published, paper=paper, **settings)


def rated(
    name: str,
    group: str,
    files: tuple[Files, ...],
    item: Reader,
    paper: str,
    published: Mapping[str, float],
    **changed: Any,
) -> Task:
    """Return a task of free answers, which published scores have a judge rate."""
    return Task(
        name,
        group,
        files,
        item,
        "rouge_l",
        boxed="",
        parser="spoken",
        decoding=LONG,
        judge="rating",
        published=published,
        paper=paper,
        note="without a judge the score is ROUGE-L with the reference, which published ratings do not compare with",
        **changed,
    )


def located(
    name: str,
    group: str,
    files: tuple[Files, ...],
    item: Reader,
    metric: str,
    form: str,
    paper: str,
    published: Mapping[str, float],
    note: str = "",
    summary: str = "mean",
) -> Task:
    """Return a task of boxes and points.

    Args:
      form: says in which form they are to be written.
    """
    return Task(
        name,
        group,
        files,
        item,
        metric,
        instruction=form,
        boxed=form,
        parser="spoken",
        decoding=LONG,
        summary=summary,
        published=published,
        paper=paper,
        note=note,
    )
