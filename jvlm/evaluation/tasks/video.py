"""Questions about videos: options, and when something happens."""

from __future__ import annotations

import dataclasses

from jvlm.data.content import Text
from jvlm.evaluation.files import Row, as_list, hub, official
from jvlm.evaluation.items import choice_item, key, open_item
from jvlm.evaluation.task import BOXED, Item, Task
from jvlm.evaluation.tasks.kinds import BOXED_LETTER, LETTER, LONG, SHORT, WITHOUT_JUDGE, choice, mimo


def _moment(row: Row) -> Item:
    """Return a sentence of Charades-STA and when it happens, in seconds."""
    start, end = (float(value) for value in as_list(row.need("timestamp")))
    text = "Locate the start and end timestamps of the video segment corresponding to the description: "
    text += f"{row.text('caption')}."
    shown = (row.video("video", suffix=".mp4"), Text(text))
    video = row.text("video")
    return Item(key(row, "qid", ""), shown, [start, end], answer=f"[{_clock(start)}, {_clock(end)}]", group=video)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _line(row: Row) -> Item | None:
    """Return a record of Charades-STA's own text: "VIDEO START END##SENTENCE."."""
    head, _, sentence = row.text("text").partition("##")
    video, start, end = head.split()
    values = {"video": video, "timestamp": [float(start), float(end)], "caption": sentence.rstrip(".")}
    return _moment(Row(values, row.origin, row.form, row.media))


def _lecture(row: Row) -> Item | None:
    """Return a question of Video-MMMU, with options or open."""
    if row.get("question_type") != "open":
        return choice_item(video=("id",), ids=("id",), parts=("question_type",))(row)
    item = open_item(video=("id",), ids=("id",))(row)
    return item and dataclasses.replace(item, boxed=BOXED)


def _choice(name, files, item, paper, published, **changed) -> Task:
    return choice(name, "video", files, paper, published, item, **changed)


TASKS = (
    _choice(
        "videomme",
        (hub("lmms-lab/Video-MME", "videomme/test-*.parquet", media="data"),),
        choice_item(
            video=("videoID",), ids=("question_id",), parts=("duration", "domain", "task_type"), group=("videoID",)
        ),
        "arXiv 2405.21075",
        {**mimo(67.4, 66.9, 65.1), "MM1.5-7B (SFT)": 53.5, "MM1.5-7B": 52.4, "MM1.5-3B": 48.4},
    ),
    Task(
        "video_mmmu",
        "video",
        (hub("lmms-lab/VideoMMMU", "*/test-*.parquet", media="videos"),),
        _lecture,
        "mmmu",
        instruction=LETTER,
        boxed=BOXED_LETTER,
        decoding=LONG,
        published=mimo(43.3, 53.1, 47.4),
        paper="arXiv 2501.13826",
    ),
    _choice(
        "egoschema",
        (hub("lmms-lab/egoschema", "Subset/test-*.parquet", media="videos"),),
        choice_item(options=("option",), video=("video_idx",), ids=("question_idx", "video_idx"), numbered=True),
        "arXiv 2308.09126",
        {**mimo(59.6, 60.4, 62.4), "MM1.5-7B (SFT)": 57.2, "MM1.5-7B": 49.6},
    ),
    Task(
        "charades_sta",
        "video",
        (
            hub("lmms-lab/charades_sta", "data/test-*.parquet", media="Charades_v1_480"),
            official("charades_sta_test.txt", media="Charades_v1_480"),
        ),
        lambda row: _line(row) if row.get("text") else _moment(row),
        "temporal_iou",
        instruction="The answer should be in the format [mm:ss, mm:ss].",
        boxed="The answer should be in the format [mm:ss, mm:ss] and placed in \\boxed{}.",
        decoding=LONG,
        published=mimo(50.0, 38.5, 43.6),
        paper="arXiv 1705.02101",
        note="the references are rounded to tenths of a second, answers to seconds",
    ),
    _choice(
        "mvbench",
        (hub("OpenGVLab/MVBench", "json/*.json", media="video"),),
        choice_item(options=("candidates",), video=("video",), ids=("",)),
        "arXiv 2311.17005",
        {"MM1.5-30B": 54.0},
        note="parts of videos (start, end) are not cut out: give the parts as files",
    ),
    _choice(
        "nextqa_mc",
        (hub("lmms-lab/NExTQA", "MC/test-*.parquet", media="NExTVideo"),),
        choice_item(options=("options",), video=("video",), ids=("",), parts=("type",)),
        "arXiv 2105.08276",
        {"MM1.5-3B": 72.8},
    ),
    _choice(
        "intentqa",
        (official("intentqa_test.csv", media="videos"), official("IntentQA/test.csv", media="videos")),
        lambda row: choice_item(
            options=("options",),
            video=("video_id",),
            ids=("qid", ""),
            parts=("type",),
            group=("video_id",),
            numbered=True,
        )(Row({**row.values, "options": [row.need(f"a{n}") for n in range(5)]}, row.origin, row.form, row.media)),
        "openaccess.thecvf.com ICCV 2023, IntentQA",
        {"MM1.5-3B": 72.7},
    ),
    Task(
        "activitynetqa",
        "video",
        (hub("lmms-lab/ActivityNetQA", "data/test-*.parquet", media="all_test"),),
        open_item(video=("video_name",), parts=("type",)),
        "exact",
        instruction=SHORT,
        decoding=LONG,
        judge="answer",
        published={"MM1.5-7B (SFT)": 60.9},
        paper="arXiv 1906.02467",
        note=WITHOUT_JUDGE,
    ),
)
