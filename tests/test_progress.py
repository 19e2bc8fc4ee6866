"""Progress where standard error is a file."""

from __future__ import annotations

import io
import sys

from jvlm import progress


def test_a_redirected_log_gets_whole_lines_now_and_then_and_a_short_job_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.Progress(total=3, desc="asking", unit="question") as bar:
        for _ in range(3):
            bar.update(1)
    assert sys.stderr.getvalue() == ""

    monkeypatch.setattr(progress, "SECONDS", 0)
    with progress.Progress(total=3, desc="asking", unit="question") as bar:
        for _ in range(3):
            bar.update(1)
    lines = sys.stderr.getvalue()
    assert "\r" not in lines
    assert [line.split("%")[0].split()[-1] for line in lines.splitlines()] == ["0", "33", "67", "100"]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Progress(total=3, desc="asking", mininterval=0) as bar:
        bar.update(3)
    assert "\rasking: 100%" in terminal.getvalue()
