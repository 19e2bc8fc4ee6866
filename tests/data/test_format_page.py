"""The examples of docs/data-format.md are examples that jvlm reads."""

import json
import re
from pathlib import Path

import pytest

from jvlm.data.content import Document
from jvlm.data.examples import parse_example

PAGE = Path(__file__).parents[2] / "docs" / "data-format.md"
EXAMPLES = [
    line for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
]


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_of_the_page_is_read(line):
    example = json.loads(line)
    parsed = parse_example(example)
    if "messages" in example:
        assert [m.role for m in parsed.messages] == [m["role"] for m in example["messages"]]
    else:
        assert isinstance(parsed, Document)
        assert parsed.text
    assert not parsed.extra
