"""Lines of a JSONL file: numbered as an editor counts; what is wrong with one of them is its own error."""

import json

import pytest

from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource

EXAMPLE = b'{"messages": 1}'
BOM = b"\xef\xbb\xbf"


def source_of(tmp_path, content):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(content)
    return ExampleSource([str(path)])


NUMBERED = {
    "plain": (EXAMPLE + b"\n" + EXAMPLE + b"\n", [1, 2]),
    "no end of the last line": (EXAMPLE + b"\n" + EXAMPLE, [1, 2]),
    "blank lines": (b"\n\n" + EXAMPLE + b"\n \t \n" + EXAMPLE + b"\n\n", [3, 5]),
    "lines of Windows": (b"\r\n" + EXAMPLE + b"\r\n\r\n" + EXAMPLE + b"\r\n", [2, 4]),
    "a mark at the beginning": (BOM + EXAMPLE + b"\n" + EXAMPLE, [1, 2]),
    "a mark on a blank line": (BOM + b"\n" + EXAMPLE, [2]),
    "files put together": (EXAMPLE + b"\n" + BOM + EXAMPLE, [1, 2]),
    "separators of other kinds inside a text": ('{"messages": "a\u2028b\u2029c\x85d"}\n'.encode() + EXAMPLE, [1, 2]),
}


@pytest.mark.parametrize("kind", NUMBERED)
def test_examples_have_the_numbers_of_their_lines(tmp_path, kind):
    content, expected = NUMBERED[kind]
    source = source_of(tmp_path, content)
    assert [source[i][0].number for i in range(len(source))] == expected
    lines = content.decode("utf-8-sig").replace("\ufeff", "").split("\n")
    for index in range(len(source)):
        origin, example = source[index]
        assert example == json.loads(lines[origin.number - 1])


BAD = {
    "no JSON": (b"{", "example", "not JSON"),
    "two objects": (EXAMPLE + EXAMPLE, "example", "not JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "example", "not UTF-8 .*utf-8"),
    "a number of 5000 digits": (b'{"messages": ' + b"1" * 5000 + b"}", "example", "not JSON"),
    "deep lists": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "example", "too deep"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "example", "too deep"),
    "a key twice": (b'{"messages": [], "images": [], "messages": []}', "messages", "twice"),
    "a key twice within": (b'{"messages": [{"role": "user", "role": "assistant"}]}', "role", "twice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_an_error_of_its_own(tmp_path, kind):
    line, field, says = BAD[kind]
    source = source_of(tmp_path, b"\n" + EXAMPLE + b"\n" + line + b"\n" + EXAMPLE)
    assert [type(source[i][1]) for i in range(3)] == [dict, ExampleError, dict]
    with pytest.raises(ExampleError, match=f"examples.jsonl, line 3, field '{field}': .*{says}"):
        raise source[1][1]
