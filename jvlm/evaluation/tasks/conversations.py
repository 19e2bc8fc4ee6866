"""Free answers about videos, which a judge rates: VCGBench (arXiv 2306.05424), and LLaVA-Hound's sets (2404.01258)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from jvlm.data.content import Part, Text, Video
from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Row, hub, official
from jvlm.evaluation.items import key, open_item
from jvlm.evaluation.task import Item, Task
from jvlm.evaluation.tasks.kinds import rated

_VIDEOS = "Test_Videos"
_FRAMES = 24  # of a video, as MM1.5 takes them
_NONE = ("", "None")  # what a snapshot writes where a record has only one of two questions


def _asked(row: Row) -> Item | None:
    """Return a question of VCGBench about a video."""
    read = open_item(
        question=("question", "Q"), answers=("answer", "A"), video=("video_name",), ids=("",), group=("video_name",)
    )
    return read(row)


def _asked_twice(row: Row) -> list[Item]:
    """Return questions of which two have one answer: of the authors' record both, of a snapshot's the one it has."""
    answer, name = row.text("answer", "A"), row.text("video_name")
    pair = f"{name}: {answer}" if row.form == "hub" else key(row, "")
    found = []
    for number, fields in enumerate((("question_1", "Q1"), ("question_2", "Q2")), 1):
        question = str(row.get(*fields, default="")).strip()
        if question in _NONE:
            continue
        shown: tuple[Part, ...] = (row.video("video_name", suffix=".mp4"), Text(question))
        found.append(Item(f"{key(row, '')}:{number}", shown, [answer], {"question": question}, answer, pair))
    return found


def _generic(
    aspect: str, file: str, folder: str, item: Callable[[Row], Item | Sequence[Item] | None], note: str = ""
) -> Task:
    files = (
        hub("lmms-lab/VideoChatGPT", f"{folder}/test-*.parquet", media=_VIDEOS),
        official(file, media=_VIDEOS),
    )
    task = rated(f"vcgbench_{aspect}", "video", files, item, "arXiv 2306.05424", {}, unit=5.0)
    return dataclasses.replace(task, judge=f"vcgbench_{aspect}", note=f"{task.note}{note}")


_PAIRS = "; two answers are judged as a pair, and one without the other (--limit) has no score"


def _conversation(part: str) -> Callable[[Row], Item]:
    """Return a reader of questions about videos whose frames are pictures in a folder of their own."""

    def read(row: Row) -> Item:
        turns = row.list("conversations")
        if len(turns) < 2:
            raise ExampleError(row.origin, "conversations", f"{len(turns)} turns, not 2", "Copy the file again")
        question = str(turns[0]["value"]).replace("<video>", "").strip()
        answer, name = str(turns[1]["value"]).strip(), Path(row.text("video")).name
        shown = (_frames(row, part, name), Text(question))
        facts = {"caption": str(row.get("caption", default=""))}
        return Item(key(row, "id", "idx"), shown, [answer], facts, answer, group=name)

    return read


def _frames(row: Row, part: str, name: str) -> Video:
    """Return the frames of a video, whose path in the file is another machine's but for its last parts."""
    video = Row({"video": f"test/{part}/{name}"}, row.origin, row.form, row.media).video("video")
    count = len(video.frames)
    if count <= _FRAMES:
        return video
    return dataclasses.replace(video, frames=tuple(video.frames[n * count // _FRAMES] for n in range(_FRAMES)))


def _hound(part: str) -> Task:
    file = f"{part}.qa.jsonl"
    task = rated(
        f"llava_hound_{part}",
        "video",
        (
            hub("ShareGPTVideo/test_video_and_instruction", f"video_instruction/test/{file}", media="video_data"),
            official(file, media="video_data"),
        ),
        _conversation(part),
        "arXiv 2404.01258",
        {},
    )
    return dataclasses.replace(task, judge="llava_hound")


TASKS = (
    *(_generic(aspect, "generic_qa.json", "Generic", _asked) for aspect in ("correctness", "detail", "context")),
    _generic("temporal", "temporal_qa.json", "Temporal", _asked),
    _generic("consistency", "consistency_qa.json", "Consistency", _asked_twice, _PAIRS),
    *(_hound(part) for part in ("actnet", "vidal", "webvid", "msrvtt", "msvd", "tgif", "ssv2")),
)
