"""An output is touched only when every byte of it is proved to be the answers to these examples with these settings."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from jvlm.data.example_source import ExampleSource
from jvlm.errors import UserError
from jvlm.inference.answer_file import HASH, AnswerFile, Run, check_paths
from tests.support import ROOT

EXAMPLES = [
    {"messages": [{"role": "user", "content": "wäs ist das?"}], "id": 1},
    {"messages": [{"role": "user", "content": "b"}], "number": float("nan")},
    {"messages": [{"role": "user", "content": "c"}], "label": "half \ud83d an emoji, é"},
    {"messages": [{"role": "user", "content": "d"}]},
]
SETTINGS = {"model": {"weights": "a"}, "sampling": {"max_new_tokens": 3, "temperature": 0.0}}
RUN = Run("11aa", SETTINGS, "data", 4, "/models/a")
OTHER = Run("22bb", {"model": {"weights": "b"}, "sampling": {"max_new_tokens": 9, "temperature": 0.0}}, "data", 4, "/b")


def answered(example, **changes):
    answer = {"response": "ja", "prompt_tokens": 3, "response_tokens": 2, "finish": "stop", HASH: RUN.settings_hash}
    return {**example, **answer, **changes}


LINES = [answered(example) for example in EXAMPLES]


def to_text(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(to_text(EXAMPLES))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def resume(data, output, run=RUN, lines=(), **options):
    """Lines that were there, after more have been appended."""
    with AnswerFile.opened(output) as file:
        done = file.resume(ExampleSource([str(data)]), data, run, **options)
        file.append(list(lines))
    return done


def begun(data, output, lines=LINES[:2], run=RUN):
    resume(data, output, run, lines)


def test_lines_are_the_examples_whatever_is_in_them_and_go_on_where_they_end(data, output):
    assert resume(data, output, lines=LINES[:3]).lines == 0
    assert resume(data, output, lines=LINES[3:]).lines == 3
    assert resume(data, output).lines == 4
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.dumps(line) for line in found] == [json.dumps(line) for line in LINES]


@pytest.mark.parametrize("cut", range(1, 130, 7))
@pytest.mark.parametrize("index", range(3))
def test_a_line_cut_anywhere_is_taken_away(data, output, index, cut):
    begun(data, output, LINES[: index + 1])
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(whole[:-cut])
    assert resume(data, output).lines == index
    assert output.read_bytes() == b"".join(lines[:index])


def test_an_error_counts_as_done_but_not_as_an_answer(data, output):
    error = {**EXAMPLES[0], "error": "no picture", HASH: RUN.settings_hash}
    begun(data, output, [error, LINES[1]])
    done = resume(data, output)
    assert (done.answered, done.errors) == (1, 1)


FOREIGN = {
    "a copy of the data": (to_text(EXAMPLES), r"line 1, is example 1 of .*data\.jsonl without an answer"),
    "a copy of the data without its last newline": (to_text(EXAMPLES[:1])[:-1], "line 1, is not the beginning"),
    "half of a copy": (to_text(EXAMPLES[:1])[:30], "line 1, is not the beginning of an answer to example 1"),
    "notes": ("my notes\n", "line 1, is not JSON"),
    "notes without a newline": ("my notes", "line 1, is not the beginning"),
    "an empty line": ("\n", "line 1, is not JSON"),
    "NUL bytes": ("\0" * 40 + "\n", "line 1, is not JSON"),
    "NUL bytes without an end": ("\0" * 40, "line 1, is not the beginning"),
    "another order": (to_text([LINES[1], LINES[0]]), "line 1, is not an answer to example 1"),
    "a line left out": (to_text([LINES[0], LINES[2]]), "line 2, is not an answer to example 2"),
    "too many lines": (to_text([*LINES, LINES[3]]), r"line 5, has no example among the 4 of .*data\.jsonl"),
    "no more than the response": (
        to_text([{**EXAMPLES[0], "response": "ja"}]),
        "line 1, is example 1 .* without an answer",
    ),
    "answers of unknown settings": (to_text([{k: v for k, v in LINES[0].items() if k != HASH}]), f"without a {HASH}"),
    "a list": ("[1, 2]\n", "line 1, is not an answer to example 1"),
    "deep JSON": ("[" * 100_000 + "\n", "line 1, is not JSON"),
    "good lines, then notes": (
        to_text(LINES[:2]) + "my notes",
        "line 3, is not the beginning of an answer to example 3",
    ),
    "good lines, then NULs": (to_text(LINES[:2]) + "\0" * 9, "line 3, is not the beginning of an answer to example 3"),
    "good lines, then an example": (
        to_text(LINES[:2]) + to_text(EXAMPLES[2:3]),
        "line 3, is example 3 of .* without an answer",
    ),
}


# after a line of ours, half of an example is the beginning of the next
@pytest.mark.parametrize(
    ("name", "ours"), [(n, o) for n in FOREIGN for o in (False, True) if (n, o) != ("half of a copy", True)]
)
def test_what_is_not_ours_is_refused_by_file_and_line_and_keeps_its_bytes(data, output, name, ours):
    if ours:
        begun(data, output)
    text, message = FOREIGN[name]
    output.write_text(text)
    with pytest.raises(UserError, match=rf"out\.jsonl, {message}" if message.startswith("line") else message):
        resume(data, output)
    assert output.read_text() == text
    assert not output.with_name("out.jsonl.lock").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary\n", b"\x89PNG\r\n\x1a\n", b'{"messages": "\xff"}\n'])
def test_bytes_that_are_no_text_are_refused(data, output, content):
    output.write_bytes(content)
    with pytest.raises(UserError, match=r"out\.jsonl, line 1, is not JSON"):
        resume(data, output)
    assert output.read_bytes() == content


def test_other_settings_are_refused_with_both_values_and_recorded_once_accepted(data, output):
    begun(data, output)
    before = output.read_bytes()
    with pytest.raises(UserError) as caught:
        resume(data, output, OTHER)
    for words in (
        "model.weights: 'a' -> 'b'",
        "sampling.max_new_tokens: 3 -> 9",
        "/models/a -> /b",
        "--accept_changes",
    ):
        assert words in str(caught.value)
    assert "temperature" not in str(caught.value)
    assert output.read_bytes() == before
    line = answered(EXAMPLES[2], **{HASH: OTHER.settings_hash})
    assert resume(data, output, OTHER, [line], accept_changes=True).lines == 2
    runs = json.loads(output.with_name("out.jsonl.meta.json").read_text())["runs"]
    assert [(run[HASH], run["first_line"], run["settings"]) for run in runs] == [
        ("11aa", 1, SETTINGS),
        ("22bb", 3, OTHER.settings),
    ]
    assert resume(data, output, OTHER).lines == 3
    with pytest.raises(UserError, match="'b' -> 'a'"):
        resume(data, output, RUN)


def test_other_data_is_refused_and_goes_on_once_accepted(data, output):
    begun(data, output)
    data.write_text(to_text([*EXAMPLES, EXAMPLES[0]]))
    longer = Run("11aa", SETTINGS, "more", 5, "/models/a")
    with pytest.raises(UserError, match=r"data: 'data' -> 'more'; examples: 4 -> 5"):
        resume(data, output, longer)
    assert resume(data, output, longer, accept_changes=True).lines == 2
    assert resume(data, output, longer).lines == 2


def test_a_moved_output_still_tells_its_settings(data, output, tmp_path):
    begun(data, output)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(output.read_bytes())
    assert resume(data, moved).lines == 2
    moved.with_name("moved.jsonl.meta.json").unlink()
    with pytest.raises(UserError, match=r"line 1, was made with other settings \(hash 11aa, now 22bb\)"):
        resume(data, moved, OTHER)
    assert resume(data, moved, OTHER, accept_changes=True).lines == 2
    assert resume(data, moved, OTHER).lines == 2


def test_settings_may_change_while_nothing_is_answered(data, output):
    begun(data, output, [])
    assert resume(data, output, OTHER).lines == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "jvlm batch file", "runs": []}', '{"my": "notes"}', "\0"])
def test_damaged_or_foreign_settings_are_refused_and_kept(data, output, content):
    begun(data, output)
    meta = output.with_name("out.jsonl.meta.json")
    meta.write_text(content)
    with pytest.raises(UserError, match=r"out\.jsonl\.meta\.json is damaged, or was not written by"):
        resume(data, output)
    assert meta.read_text() == content


def test_a_second_run_is_told_who_writes(data, output, tmp_path):
    link = tmp_path / "link.jsonl"
    with AnswerFile.opened(output):
        link.symlink_to(output)
        for path in (output, link):
            with pytest.raises(
                UserError, match=rf"another run writes .*out\.jsonl: process {os.getpid()} on \S+, since"
            ):
                resume(data, path)
    assert resume(data, output).lines == 0
    assert not output.with_name("out.jsonl.lock").exists()


def test_the_lock_of_a_killed_run_is_no_lock(data, output):
    code = "import os, sys; from pathlib import Path; from jvlm.inference.answer_file import AnswerFile\n"
    code += f"with AnswerFile.opened(Path({str(output)!r})): print(os.getpid(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        pid = int(other.stdout.readline())
        with pytest.raises(UserError, match=f"process {pid} on "):
            resume(data, output)
        other.kill()
    assert output.with_name("out.jsonl.lock").exists()
    assert resume(data, output).lines == 0


def test_a_lock_that_is_not_ours_is_kept(data, output):
    lock = output.with_name("out.jsonl.lock")
    lock.write_text("my notes")
    with pytest.raises(UserError, match=r"out\.jsonl\.lock was not written by jvlm generate"):
        resume(data, output)
    assert lock.read_text() == "my notes"


def test_a_full_disk_is_one_message_and_the_line_is_finished_later(data, output):
    begun(data, output, LINES[:1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    meta = output.with_name("out.jsonl.meta.json").stat().st_size
    room = output.stat().st_size + 20
    padded = [{**LINES[1], "response": "ja" * meta}]  # the settings, smaller, still fit
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, meta + 100), hard))
        with pytest.raises(UserError, match=rf"out\.jsonl cannot be written \({os.strerror(errno.EFBIG)}\)"):
            resume(data, output, lines=padded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not output.read_bytes().endswith(b"\n")
    assert resume(data, output, lines=padded).lines == 1
    assert resume(data, output).lines == 2


def test_an_output_that_is_the_data_is_refused(data, tmp_path):
    before = data.read_bytes()
    (tmp_path / "symbolic.jsonl").symlink_to(data)
    os.link(data, tmp_path / "hard.jsonl")
    for output in (
        data,
        tmp_path / "symbolic.jsonl",
        tmp_path / "hard.jsonl",
        tmp_path / ".." / tmp_path.name / data.name,
    ):
        with pytest.raises(UserError, match="are the same file"):
            check_paths(data, output)
    assert data.read_bytes() == before


@pytest.mark.parametrize("pattern", ["*.jsonl", "da*.jsonl", "../*/*.jsonl", "**/*.jsonl", "[do]*.jsonl"])
def test_an_output_that_a_glob_would_find_is_refused_before_it_is_there(data, output, pattern, monkeypatch):
    monkeypatch.chdir(data.parent)
    hit = output if pattern != "da*.jsonl" else output.with_name("da2.jsonl")
    with pytest.raises(UserError, match="would be part of the data"):
        check_paths(pattern, hit)
    check_paths("da*.jsonl", output)


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "is a folder"), ("/dev/full", "not a regular file"), ("gs://b/out.jsonl", "this machine's disk")],
)
def test_what_is_no_file_on_a_disk_is_refused(data, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        check_paths(data, name or tmp_path)


@pytest.mark.parametrize("name", ["data.jsonl/out.jsonl", "/proc/none/out.jsonl", "a" * 300 + ".jsonl"])
def test_a_path_that_cannot_be_written_is_one_message(data, tmp_path, name):
    with pytest.raises(UserError, match="cannot be written"):
        resume(data, tmp_path / name)


def test_a_missing_data_file_and_an_empty_glob_are_named(tmp_path):
    for name in ("none.jsonl", "none*.jsonl"):
        with pytest.raises(UserError, match=name.replace("*", r"\*")):
            check_paths(tmp_path / name, tmp_path / "out.jsonl")


def test_examples_of_several_files_with_blank_lines_are_named_as_an_editor_does(tmp_path, output):
    (tmp_path / "d1.jsonl").write_text(to_text(EXAMPLES[:2]))
    (tmp_path / "d2.jsonl").write_text("\n\n" + to_text(EXAMPLES[2:]))
    output.write_text(to_text([*LINES[:2], LINES[3]]))
    with pytest.raises(
        UserError, match=r"line 3, is not an answer to example 3 of .*d\*\.jsonl \(.*d2\.jsonl, line 3\)"
    ):
        resume(tmp_path / "d*.jsonl", output)
