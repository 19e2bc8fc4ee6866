"""The file of answers that ms-swift's ``infer`` writes: one JSON object a line, as many lines as examples are done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jvlm.errors import UserError, file_errors
from jvlm.training.side_files import read_lines, write_lines

_MEDIA = ("images", "image", "videos", "video", "objects", "tools")


def prompt_and_label(example: Any) -> tuple[list[dict[str, Any]], str | None]:
    """Return the messages of an example up to its last answer, and that answer; None where the user has the last word.

    Raises:
      UserError: there are no messages.
    """
    messages = example.get("messages") if isinstance(example, Mapping) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise UserError("an example has no list of messages")
    if messages[-1].get("role") == "assistant":
        return [dict(message) for message in messages[:-1]], messages[-1].get("content")
    return [dict(message) for message in messages], None


def line(example: Mapping[str, Any], response: str) -> dict[str, Any]:
    """Return the line of an answer."""
    messages, label = prompt_and_label(example)
    media = {name: example[name] for name in _MEDIA if name in example}
    answered = [*messages, {"role": "assistant", "content": response}]
    return {"response": response, "labels": label, "logprobs": None, "messages": answered, **media}


def error_line(example: Any, error: str) -> dict[str, Any]:
    """Return the line of an example that cannot be answered."""
    messages = example.get("messages") if isinstance(example, Mapping) else None
    return {"response": None, "labels": None, "logprobs": None, "messages": messages, "error": error}


class ResultFile:
    """A file of answers that goes on where it ended.

    Attributes:
      lines: those that it has.
    """

    def __init__(self, path: Path, examples: Sequence[Any]):
        """Open the file, leaving out a last line that was cut short.

        Raises:
          UserError: it holds answers to other examples, or cannot be written.
        """
        self.path = path
        with file_errors(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = read_lines(path)
        if len(self.lines) > len(examples):
            raise UserError(f"{path} has {len(self.lines)} lines, more than there are examples; give another file")
        for number, (found, example) in enumerate(zip(self.lines, examples, strict=False), 1):
            if "error" not in found and found.get("messages", [])[:-1] != prompt_and_label(example)[0]:
                raise UserError(f"{path}, line {number} is no answer to example {number}; give another --result_path")
        with file_errors(path, "written"):
            write_lines(path, self.lines)

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line."""
        with file_errors(self.path, "written"), open(self.path, "a") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.lines.append(dict(values))

    def accuracy(self) -> tuple[int, int]:
        """Return how many answers are the expected ones but for space around them, and how many have one."""
        labelled = [found for found in self.lines if found["labels"] is not None]
        return sum(_same(found) for found in labelled), len(labelled)


def _same(found: Mapping[str, Any]) -> bool:
    return found["response"] is not None and found["response"].strip() == found["labels"].strip()
