"""Pages of PDF files are read as pypdfium2 itself reads them; damaged and slow files are errors of their examples."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.prepare import pdf
from jvlm.data.prepare.pdf import PdfPages, PdfSettings, page_scene
from jvlm.errors import UserError

LINES = ("Quarterly report", "Total 41.20 EUR", "Signed: A. Person")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A PDF of three pages, the second one rotated; and the same cut short."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.backends.backend_pdf import PdfPages as Writer
    from matplotlib.figure import Figure

    folder = tmp_path_factory.mktemp("pdf")
    with matplotlib.rc_context({"pdf.fonttype": 42}), Writer(folder / "plain.pdf") as writer:
        for page in range(3):
            figure = Figure(figsize=(5, 7))
            for number, line in enumerate(LINES):
                figure.text(0.15, 0.8 - 0.2 * number, f"{line} {page + 1}", fontsize=16)
            writer.savefig(figure)
    with pypdfium2.PdfDocument(folder / "plain.pdf") as document:
        document[1].set_rotation(90)
        document.save(folder / "good.pdf")
    content = (folder / "good.pdf").read_bytes()
    (folder / "cut.pdf").write_bytes(content[: len(content) // 3])
    return folder


@pytest.mark.parametrize("page", [0, 1])
def test_text_is_pdfiums_own_and_every_box_holds_the_ink_of_its_line(files, page):
    scene = page_scene(str(files / "good.pdf"), page, 144, 4096, "line")
    with pypdfium2.PdfDocument(files / "good.pdf") as document:
        own = document[page].get_textpage().get_text_range()
        size = document[page].get_size()
    assert scene.text.split() == own.split()
    assert scene.size == tuple(round(2 * side) for side in size)
    # of the rotated page, PDFium's order is another
    assert sorted(one.text for one in scene.regions) == sorted(f"{line} {page + 1}" for line in LINES)
    dark = np.asarray(Image.open(io.BytesIO(scene.image)).convert("L")) < 128
    covered = np.zeros_like(dark)
    for region in scene.regions:
        x1, y1, x2, y2 = (round(v) for v in region.box)
        inside = dark[y1 : y2 + 1, x1 : x2 + 1]
        assert inside.mean() > 0.05
        # its edges touch ink: the box is no larger than the letters, but for a pixel or two
        ys, xs = np.nonzero(inside)
        assert max(xs.min(), ys.min(), inside.shape[1] - 1 - xs.max(), inside.shape[0] - 1 - ys.max()) <= 3
        covered[max(y1 - 1, 0) : y2 + 2, max(x1 - 1, 0) : x2 + 2] = True
    assert not (dark & ~covered).any()


def test_words_are_the_words_of_the_text(files):
    scene = page_scene(str(files / "good.pdf"), 0, 72, 4096, "word")
    assert [one.text for one in scene.regions] == scene.text.split()


def test_the_command_writes_chosen_pages_and_counts_a_damaged_file(files, tmp_path, capsys):
    command = ["data", "pdf", f"{files}/good.pdf", f"{files}/cut.pdf", "--pages", "2-", "--task", "read_boxes"]
    assert cli.main([*command, "--output", str(tmp_path / "a")]) == 2
    assert "cut.pdf" in capsys.readouterr().err
    listed = tmp_path / "rejected.jsonl"
    command += ["--on_bad_example", "skip", "--rejected", str(listed)]
    assert cli.main([*command, "--output", str(tmp_path / "b")]) == 0
    assert "3 examples read, 2 written, 1 left out" in capsys.readouterr().out
    assert [json.loads(line)["file"] for line in listed.read_text().splitlines()] == [str(files / "cut.pdf")]
    shards = ExampleSource([f"{tmp_path}/b/*.arrayrecord"])
    assert [shards[i][1]["page"] for i in range(2)] == [2, 3]
    parsed = parse_example(shards[1][1])
    assert len(parsed.boxes) == len(LINES)


def _slow(*_: object) -> None:
    time.sleep(60)


def test_a_page_that_takes_too_long_is_killed_and_the_next_one_is_read(files, monkeypatch):
    settings = PdfSettings(seconds=20)
    with PdfPages([f"{files}/good.pdf"], settings) as pages:
        monkeypatch.setattr(pdf, "page_scene", _slow)
        object.__setattr__(settings, "seconds", 1)
        began = time.monotonic()
        assert "longer than 1 s" in str(pages.read(0).record)
        assert time.monotonic() - began < 15
        monkeypatch.undo()
        object.__setattr__(settings, "seconds", 20)
        assert pages.read(1).record["page"] == 2


@pytest.mark.parametrize("pages", ["0", "5-2", "x", "-3"])
def test_wrong_pages_are_named(pages):
    with pytest.raises(UserError, match="give a number from 1"):
        PdfSettings(pages=(pages,))


def test_pages_are_chosen_once_each_and_in_order():
    assert PdfSettings(pages=("3-4", "1", "4-", "9")).chosen(6) == [0, 2, 3, 4, 5]
    assert PdfSettings(pages=("2",)).chosen(1) == []
