"""Small benchmarks in the forms that people have, and clients that answer as they are told."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from jvlm.data.boxes import Sizes
from jvlm.evaluation.clients import Prompt, Reply
from jvlm.evaluation.prompting import shown
from jvlm.evaluation.task import Decoding


def png(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (56, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int = 0) -> dict:
    """An image as the Hub's Parquet files hold it."""
    return {"bytes": png((40 * number % 256, 90, 200)), "path": f"{number}.png"}


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def docvqa(folder: Path, count: int = 6) -> None:
    """DocVQA's validation part as a snapshot of the Hub."""
    rows = [
        {
            "questionId": str(n),
            "question": f"What is the number {n}?",
            "docId": n // 2,
            "image": picture(n),
            "answers": [f"number {n}", f"No. {n}"],
        }
        for n in range(count)
    ]
    parquet(folder / "lmms-lab" / "DocVQA" / "DocVQA" / "validation-00000-of-00001.parquet", rows)


def mmmu(folder: Path) -> None:
    """MMMU as VLMEvalKit's table: an image as base64, or the index of the row that holds it."""
    encoded = base64.b64encode(png()).decode()
    lines = [
        "index\tquestion\tA\tB\tC\tanswer\tcategory\tsplit\timage",
        f"1\tWhich colour?\tred\tblue\tgreen\tA\tArt\tvalidation\t{encoded}",
        "2\tWhich form?\tround\tsquare\t\tB\tArt\tvalidation\t1",
        f"3\tWhich is left out?\tx\ty\t\tB\tArt\tdev\t{encoded}",
    ]
    (folder / "MMMU_DEV_VAL.tsv").write_text("\n".join(lines) + "\n")


def screenspot(folder: Path) -> None:
    """ScreenSpot as a snapshot in the Hub's cache; boxes are shares of the image."""
    rows = [
        {"file_name": f"{n}.png", "bbox": [0.5, 0.0, 1.0, 0.5], "instruction": f"press {n}", "data_type": "icon"}
        | {"data_source": "ios", "image": picture(n)}
        for n in range(3)
    ]
    cached = folder / "datasets--rootsautomation--ScreenSpot" / "snapshots" / "abc"
    parquet(cached / "data" / "test-00000-of-00001.parquet", rows)


@dataclasses.dataclass
class Scripted:
    """Answers what a function says; an answer that is None fails, and one that is an exception is raised."""

    answer: Callable[[str], str | Exception | None]
    finish: str = "stop"
    box_form = "json"
    box_space = None
    name: str = "scripted"

    def __post_init__(self):
        self.asked: list[str] = []

    def describe(self) -> dict:
        return {"kind": "scripted", "model": self.name}

    def replies(self, prompts: Iterable[Prompt], decoding: Decoding) -> Iterator[Reply]:
        for prompt in prompts:
            content = (
                prompt.example.messages[-1].content if hasattr(prompt.example, "messages") else prompt.example.content
            )
            text = shown(content)
            self.asked.append(text)
            given = self.answer(text)
            if isinstance(given, Exception):
                raise given
            if given is None:
                yield Reply(prompt.id, finish="error", error="503 from the server")
            else:
                sizes = (Sizes((56, 28), (56, 28)),)
                yield Reply(prompt.id, given, self.finish, 10, 5, 0.01, sizes=sizes)
