"""Lines of a JSONL file: numbered as an editor counts; what is wrong with one of them is its own error."""

import json

import pytest

from jvlm.data.errors import RowError
from jvlm.data.shards import RowSource

ROW = b'{"messages": 1}'
BOM = b"\xef\xbb\xbf"


def source_of(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return RowSource([str(path)])


NUMBERED = {
    "plain": (ROW + b"\n" + ROW + b"\n", [1, 2]),
    "no end of the last line": (ROW + b"\n" + ROW, [1, 2]),
    "blank lines": (b"\n\n" + ROW + b"\n \t \n" + ROW + b"\n\n", [3, 5]),
    "lines of Windows": (b"\r\n" + ROW + b"\r\n\r\n" + ROW + b"\r\n", [2, 4]),
    "a mark at the beginning": (BOM + ROW + b"\n" + ROW, [1, 2]),
    "a mark on a blank line": (BOM + b"\n" + ROW, [2]),
    "files put together": (ROW + b"\n" + BOM + ROW, [1, 2]),
    "separators of other kinds inside a text": ('{"messages": "a\u2028b\u2029c\x85d"}\n'.encode() + ROW, [1, 2]),
}


@pytest.mark.parametrize("kind", NUMBERED)
def test_rows_have_the_numbers_of_their_lines(tmp_path, kind):
    content, expected = NUMBERED[kind]
    source = source_of(tmp_path, content)
    assert [source[i][0].row for i in range(len(source))] == expected
    lines = content.decode("utf-8-sig").replace("\ufeff", "").split("\n")
    for index in range(len(source)):
        origin, row = source[index]
        assert row == json.loads(lines[origin.row - 1])


BAD = {
    "no JSON": (b"{", "row", "not JSON"),
    "two objects": (ROW + ROW, "row", "not JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "row", "not JSON .*utf-8"),
    "a number of 5000 digits": (b'{"messages": ' + b"1" * 5000 + b"}", "row", "not JSON"),
    "deep lists": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "row", "too deep"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "row", "too deep"),
    "a key twice": (b'{"messages": [], "images": [], "messages": []}', "messages", "twice"),
    "a key twice within": (b'{"messages": [{"role": "user", "role": "assistant"}]}', "role", "twice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_an_error_of_its_own(tmp_path, kind):
    line, field, says = BAD[kind]
    source = source_of(tmp_path, b"\n" + ROW + b"\n" + line + b"\n" + ROW)
    assert [type(source[i][1]) for i in range(3)] == [dict, RowError, dict]
    with pytest.raises(RowError, match=f"rows.jsonl, row 3, field '{field}': .*{says}"):
        raise source[1][1]
