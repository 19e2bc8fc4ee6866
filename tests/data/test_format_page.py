"""The examples of docs/data-format.md are examples that jvlm reads."""

import json
import re
from pathlib import Path

import pytest

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
    conversation = parse_example(example)
    assert [m.role for m in conversation.messages] == [m["role"] for m in example["messages"]]
    assert not conversation.extra
