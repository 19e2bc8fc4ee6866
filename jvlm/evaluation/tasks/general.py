"""Questions about pictures in general, most of them with options."""

from __future__ import annotations

from jvlm.data.content import Text
from jvlm.evaluation.files import Row, hub, tsv
from jvlm.evaluation.items import LETTERS, choice_item, content, key, letter_of, open_item, options_of
from jvlm.evaluation.task import BOXED, Item, Task
from jvlm.evaluation.tasks.kinds import BOXED_COUNT, BOXED_LETTER, BRIEF, COUNT, LONG, SHORT, choice, mimo, rated

_PICTURES = tuple(f"image_{number}" for number in range(1, 8))


def mmmu_item(row: Row) -> Item | None:
    """Return a question of MMMU or MMMU-Pro, with options or open; images stand where the text names them."""
    if row.form == "tsv" and row.get("split", default="validation") != "validation":
        return None
    options = options_of(row, ("options",))
    is_open = row.get("question_type") == "open" or not options
    text = row.text("question")
    if not is_open:
        text += "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    gold = [str(one) for one in row.list("answer")] if is_open else letter_of(row, row.need("answer"), options)
    name = key(row, "id", "index")
    subject = row.get("subject", "category") or name.partition("_")[2].rpartition("_")[0]
    return Item(
        name,
        content(row, text, images=("image",) if row.form == "tsv" else _PICTURES),
        gold,
        {"options": [] if is_open else options},
        gold[0] if isinstance(gold, list) else gold,
        categories={"subject": str(subject), "kind": "open" if is_open else "choice"},
        boxed=BOXED if is_open else None,
    )


def _written(row: Row) -> Item:
    """Return a question of MMMU-Pro's vision part, of which the picture holds question and options."""
    options = options_of(row, ("options",))
    gold = letter_of(row, row.need("answer"), options)
    text = "Answer the question that is written in the image."
    shown = (*row.images("image"), Text(text))
    return Item(key(row, "id"), shown, gold, {"options": options}, gold, categories={"subject": row.text("subject")})


def _reward(row: Row) -> Item:
    """Return a question of VL-RewardBench: which of two answers is better. Which stands first follows from lengths."""
    answers = [str(one) for one in row.need("response")]
    swapped = sum(map(len, answers)) % 2 == 1
    better = [int(rank) for rank in row.need("human_ranking")].index(0)
    shown = answers[::-1] if swapped else answers
    text = (
        "Which of two answers to a question about the image is better: more accurate, complete, clear and relevant?\n\n"
        f"Question: {row.text('query')}\n\nAnswer 1: {shown[0]}\n\nAnswer 2: {shown[1]}\n\n"
        "Explain your reasoning, then end with a line of this form. Overall Judgment: Answer X is better."
    )
    name = key(row, "id")
    source = name.split("-")[0].split("_")[0].lower()
    group = {"mathverse": "reasoning", "mmmu": "reasoning"} | dict.fromkeys(
        ("hallucination", "rlhf", "rlaif"), "hallucination"
    )
    gold = 1 + (better != swapped)
    kind = {"group": group.get(source, "general")}
    return Item(name, content(row, text), gold, answer=f"Overall Judgment: Answer {gold} is better.", categories=kind)


def _mantis(row: Row) -> Item | None:
    """Return a question of Mantis-Eval, with options or short."""
    read = choice_item(parts=("category",)) if row.get("question_type") == "multi-choice" else open_item()
    return read(row)


def _compared(row: Row) -> Item | None:
    """Return a question of Q-Bench2 about two images; options that are not used are "N/A"."""
    options = [
        str(row.get(f"option{number}")) for number in range(4) if row.get(f"option{number}") not in (None, "N/A")
    ]
    values = {**row.values, "options": options}
    return choice_item(images=("image1", "image2"), ids=("id", ""))(Row(values, row.origin, row.form, row.media))


def _choice(name, files, paper, published, *, group="general", **changed) -> Task:
    return choice(name, group, files, paper, published, **changed)


def _count(name: str, repo: str, answers: tuple[str, ...], published: dict[str, float], paper: str) -> Task:
    return Task(
        name,
        "general",
        (hub(repo, "data/test-*.parquet"),),
        open_item(answers=answers, ids=("",)),
        "count",
        instruction=COUNT,
        boxed=BOXED_COUNT,
        decoding=LONG,
        published=published,
        paper=paper,
    )


_MMBENCH = choice_item(hint="hint", parts=("category", "l2-category"))
_HIDDEN = "answers of this part are not public: give a file that has them, or take mmbench_en_dev"
TASKS = (
    Task(
        "mmmu_val",
        "general",
        (
            hub("MMMU/MMMU", "*/validation-*.parquet"),
            hub("lmms-lab/MMMU", "data/validation-*.parquet"),
            tsv("MMMU_DEV_VAL"),
        ),
        mmmu_item,
        "mmmu",
        instruction="Answer with the option's letter from the given choices directly, or with a single word or phrase.",
        boxed=BOXED_LETTER,
        decoding=LONG,
        judge="answer",
        published={**mimo(66.7, 64.6, 58.6), "MM1.5-30B": 47.4, "MM1.5-3B": 37.1, "Idefics2-8B": 43.0},
        paper="arXiv 2311.16502",
    ),
    _choice(
        "mmmu_pro_standard",
        (hub("MMMU/MMMU_Pro", "standard (10 options)/test-*.parquet"), tsv("MMMU_Pro_10c")),
        "arXiv 2409.02813",
        mimo(46.2, 45.2, 34.7),
        item=mmmu_item,
    ),
    _choice(
        "mmmu_pro_vision",
        (hub("MMMU/MMMU_Pro", "vision/test-*.parquet"),),
        "arXiv 2409.02813",
        mimo(40.3, 39.4, 29.4),
        item=_written,
    ),
    *(
        _choice(
            f"mmbench_{language}_{part}",
            (
                hub("lmms-lab/MMBench", f"{language}/{part}-*.parquet"),
                tsv(f"MMBench_{part.upper()}_{language.upper()}_V11"),
                tsv(f"MMBench_{part.upper()}_{language.upper()}"),
            ),
            "arXiv 2307.06281",
            published,
            item=_MMBENCH,
            note=_HIDDEN if part == "test" else "",
        )
        for language, part, published in (
            ("en", "test", mimo(84.4, 84.5, 83.5)),
            ("cn", "test", mimo(82.0, 81.9, 83.4)),
            ("en", "dev", {"MM1.5-3B": 72.4}),
            ("cn", "dev", {}),
        )
    ),
    Task(
        "mantis",
        "general",
        (hub("TIGER-Lab/Mantis-Eval", "mantis_eval/test-*.parquet"), hub("TIGER-Lab/Mantis-Eval", "*/test-*.parquet")),
        _mantis,
        "maths_or_choice",
        instruction="Answer with the option's letter if there are options, else with a single word or phrase.",
        decoding=LONG,
        published={**mimo(78.3, 78.8, 74.7), "MM1.5-30B": 64.6},
        paper="arXiv 2405.01483",
    ),
    *(
        _choice(
            name,
            (hub(f"yifanzhang114/{repo}", "data/train-*.parquet"), tsv(table)),
            "arXiv 2408.13257",
            published,
            item=choice_item(
                options=("multi-choice options",), images=("bytes", "image"), parts=("category", "l2-category")
            ),
        )
        for name, repo, table, published in (
            ("mme_realworld", "MME-RealWorld-Lmms-eval", "MME-RealWorld", mimo(59.1, 57.4, 57.4)),
            ("mme_realworld_cn", "MME-RealWorld-CN-Lmms-eval", "MME-RealWorld-CN", mimo(55.5, 55.0, 51.2)),
        )
    ),
    _choice(
        "ai2d",
        (hub("lmms-lab/ai2d", "data/test-*.parquet"), tsv("AI2D_TEST")),
        "arXiv 1603.07396",
        {**mimo(83.5, 83.2, 83.9), "MM1.5-30B": 77.2, "MM1.5-3B": 65.7, "MM1.5-1B": 59.3},
        item=lambda row: choice_item(numbered=row.form == "hub")(row),
        group="knowledge",
    ),
    _choice(
        "blink_val",
        (hub("BLINK-Benchmark/BLINK", "*/val-*.parquet"), tsv("BLINK")),
        "arXiv 2404.12390",
        mimo(62.4, 62.5, 56.4),
        item=lambda row: choice_item(
            question=("prompt", "question"),
            images=("image_1", "image_2", "image_3", "image_4", "image"),
            parts={"task": "sub_task"} if row.form == "hub" else {"task": "category"},
            listed=row.get("prompt") is None,
        )(row),
        group="multi-image",
    ),
    _choice(
        "cv_bench",
        (hub("nyu-visionx/CV-Bench", "test*.parquet"), tsv("CV-Bench")),
        "arXiv 2406.16860",
        mimo(82.3, 81.8, 75.4),
        item=choice_item(parts=("type", "task", "source")),
    ),
    rated(
        "vibe_eval",
        "general",
        (hub("RekaAI/VibeEval", "data/test-*.parquet"),),
        open_item(
            question=("prompt",), answers=("reference",), ids=("example_id",), parts=("category",), images=("image",)
        ),
        "arXiv 2405.02287",
        mimo(54.7, 47.2, 47.7),
    ),
    Task(
        "vl_rewardbench",
        "general",
        (hub("MMInstruction/VL-RewardBench", "data/test-*.parquet"),),
        _reward,
        "judgment",
        boxed="",
        parser="spoken",
        decoding=LONG,
        summary="macro_group",
        judge=None,
        published=mimo(62.7, 61.9, 47.3),
        paper="arXiv 2411.17451",
    ),
    _choice(
        "vstar",
        (hub("lmms-lab/vstar-bench", "data/test-*.parquet"), tsv("VStarBench")),
        "arXiv 2312.14135",
        mimo(81.7, 80.6, 73.8),
        item=lambda row: choice_item(
            question=("text", "question"), answer=("label", "answer"), parts=("category",), listed=row.form == "tsv"
        )(row),
    ),
    Task(
        "vlms_are_blind",
        "general",
        (hub("XAI/vlmsareblind", "data/valid-*.parquet"), tsv("VLMBlind")),
        open_item(
            question=("prompt", "question"), answers=("groundtruth", "answers", "answer"), ids=("",), parts=("task",)
        ),
        "exact",
        instruction="Answer in curly brackets, as the question says, and nothing else.",
        decoding=LONG,
        published=mimo(79.4, 78.0, 37.4),
        paper="arXiv 2407.06581",
    ),
    _count("pixmo_count", "kcz358/pixmo-count", ("answers", "answer"), mimo(79.4, 79.4, 60.7), "arXiv 2409.17146"),
    _count("countbench", "vikhyatk/CountBenchQA", ("number",), mimo(90.4, 87.0, 74.1), "arXiv 2302.12066"),
    Task(
        "mme",
        "general",
        (hub("lmms-lab/MME", "data/test-*.parquet"), tsv("MME")),
        lambda row: open_item(
            ids=("",), parts=("category",), group=("question_id",) if row.form == "hub" else ("image_path", "image")
        )(row),
        "yes_no",
        instruction=SHORT,
        decoding=BRIEF,
        summary="mme",
        paper="arXiv 2306.13394",
        note="over the maximum of 2800, as MM1.5 reports it",
    ),
    _choice(
        "seedbench_img",
        (hub("lmms-lab/SEED-Bench", "data/test-*.parquet"), tsv("SEEDBench_IMG")),
        "arXiv 2307.16125",
        {"MM1.5-30B": 75.0, "MM1.5-3B": 72.4, "MM1-30B": 72.1},
        item=lambda row: choice_item()(row) if row.get("data_type", default="image") == "image" else None,
    ),
    Task(
        "vqav2_val",
        "general",
        (hub("lmms-lab/VQAv2", "data/validation-*.parquet"),),
        open_item(group=("image_id",), parts={"type": "answer_type"}),
        "vqa",
        instruction=SHORT,
        decoding=BRIEF,
        published={"Idefics2-8B (test-dev)": 81.2},
        paper="arXiv 1612.00837",
    ),
    Task(
        "pope",
        "general",
        (hub("lmms-lab/POPE", "data/test-*.parquet"), tsv("POPE")),
        open_item(ids=("",), parts=("category",), group=("image_source",)),
        "yes_no",
        instruction=SHORT,
        decoding=BRIEF,
        paper="arXiv 2305.10355",
        note="accuracy over the three parts; papers also give F1, or the mean of the parts",
    ),
    Task(
        "realworldqa",
        "general",
        (hub("lmms-lab/RealWorldQA", "data/test-*.parquet"), tsv("RealWorldQA")),
        lambda row: choice_item()(row) if row.form == "tsv" else open_item(ids=("",))(row),
        "maths_or_choice",
        instruction="",
        decoding=BRIEF,
        published={"MM1.5-30B": 69.0, "MM1.5-3B": 56.9, "MM1-30B": 59.4},
        paper="x.ai/news/grok-1.5v",
        note="questions of the snapshot hold their own instruction",
    ),
    _choice(
        "scienceqa_img",
        (hub("lmms-lab/ScienceQA", "ScienceQA-IMG/test-*.parquet"), tsv("ScienceQA_TEST")),
        "arXiv 2209.09513",
        {"MM1.5-30B": 91.9, "MM1.5-3B": 85.8, "MM1-30B": 81.0},
        item=choice_item(hint="hint", parts=("subject", "topic"), ids=("index", "")),
        group="knowledge",
    ),
    _choice(
        "muirbench",
        (hub("MUIRBENCH/MUIRBENCH", "data/test-*.parquet"), tsv("MUIRBench")),
        "arXiv 2406.09411",
        {"MM1.5-30B": 58.2},
        item=choice_item(images=("image_list", "image"), parts=("task", "image_relation")),
        group="multi-image",
    ),
    _choice(
        "qbench2",
        (hub("q-future/Q-Bench2-HF", "data/dev-*.parquet"),),
        "arXiv 2402.07116",
        {"MM1.5-30B": 79.3},
        item=_compared,
        group="multi-image",
    ),
    Task(
        "nlvr2",
        "multi-image",
        (hub("TIGER-Lab/Mantis-NLVR2", "*.parquet"), hub("lmms-lab/NLVR2", "data/*test*.parquet")),
        open_item(
            answers=("answer", "label"), images=("images", "left_image", "right_image"), ids=("identifier", "uid", "")
        ),
        "exact",
        instruction="Is this true of both images together? Answer with True or False.",
        decoding=BRIEF,
        published={"MM1.5-30B": 90.6},
        paper="arXiv 1811.00491",
    ),
    rated(
        "mmvet",
        "general",
        (hub("lmms-lab/MMVet", "data/test-*.parquet"), tsv("MMVet")),
        open_item(parts=("capability",)),
        "arXiv 2308.02490",
        {"MM1.5-30B": 52.0, "MM1.5-7B": 42.2, "MM1.5-3B": 41.0, "MM1.5-1B": 37.4},
    ),
    rated(
        "llava_wild",
        "general",
        (hub("lmms-lab/llava-bench-in-the-wild", "data/train-*.parquet"), tsv("LLaVABench")),
        open_item(answers=("gpt_answer", "answer"), parts=("category",)),
        "arXiv 2304.08485",
        {},
    ),
)
