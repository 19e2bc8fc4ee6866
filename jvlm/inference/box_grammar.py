"""Boxes and points as a grammar: in the form that a model was taught, and within its picture."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from jvlm.data.box_formats import FORMATS, FormatName
from jvlm.data.boxes import CoordinateSpace

MAX_REGIONS = 256
_LABEL = 128  # characters
_PIECES = re.compile(r"(<\|[^|>]*\|>|\{\w+\})")
_STRING = rf'"([^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{{4}}){{0,{_LABEL}}}"'


def box_grammar(
    form: FormatName,
    size: tuple[int, int],
    *,
    space: CoordinateSpace | None = None,
    special_tokens: Collection[str] = (),
) -> str:
    """Return the Lark grammar of answers that are labelled boxes and points.

    Coordinates are whole numbers from 0 to the picture's width or height, 0 to 999 in thousandths, and shares with
    three decimals in "norm1". That corners are in order is not part of it.

    Args:
      form: how the model writes them.
      size: (width, height) of the picture, in the pixels that the model writes.
      space: replaces the format's own.
      special_tokens: of the tokenizer; those in the form are single tokens, others are text.
    """
    style = FORMATS[form]
    space = space or style.space
    largest = (999, 999) if space == "norm1000" else size
    ranges = [r"0\.[0-9]{3}|1\.000" if space == "norm1" else range_pattern(n) for n in largest]
    lines = [f"X: /{ranges[0]}/", f"Y: /{ranges[1]}/", r"WS: /[ \n\r\t]{1,6}/"]
    if style.named is None:
        return "\n".join([*_json_rules(style.box, style.point), *lines])
    box, point = (_rule(template, special_tokens) for template in (style.box, style.point))
    return "\n".join(
        [
            f'start: entry ("\\n" entry){{0,{MAX_REGIONS - 1}}}',
            f"entry: named | region\nnamed: {_rule(style.named, special_tokens)}",
            f"region: box | point\nbox: {box}\npoint: {point}",
            f"LABEL: /{_label_pattern(style.named)}/",
            *lines[:2],
        ]
    )


def range_pattern(most: int) -> str:
    """Return a regular expression of the whole numbers from 0 to ``most``, without leading zeros."""
    digits = str(most)
    parts = ["[0-9]" if n == 1 else f"[1-9][0-9]{{{n - 1}}}" for n in range(1, len(digits))]
    for i, digit in enumerate(digits):
        least, below = (1 if i == 0 and len(digits) > 1 else 0), int(digit) - 1
        if below >= least:
            left = len(digits) - i - 1
            parts.append(f"{digits[:i]}[{least}-{below}]" + (f"[0-9]{{{left}}}" if left else ""))
    return "|".join([*parts, digits])


def _json_rules(box: str, point: str) -> list[str]:
    """Return the rules of a list of objects, in a fence or bare, with little white space between them."""

    def numbers(template: str) -> str:
        names = re.findall(r"\{(\w)\d?\}", template)
        return ' WS? "," WS? '.join(name.upper() for name in names)

    return [
        'start: list | "```json" WS list WS? "```"',
        f'list: "[" WS? "]" | "[" WS? item (WS? "," WS? item){{0,{MAX_REGIONS - 1}}} WS? "]"',
        'item: "{" WS? region WS? "," WS? "\\"label\\"" WS? ":" WS? LABEL WS? "}"',
        "region: box | point",
        f'box: "\\"bbox_2d\\"" WS? ":" WS? "[" WS? {numbers(box)} WS? "]"',
        f'point: "\\"point_2d\\"" WS? ":" WS? "[" WS? {numbers(point)} WS? "]"',
        f"LABEL: /{_STRING}/",
    ]


def _rule(template: str, special_tokens: Collection[str]) -> str:
    """Return a template as the right side of a rule."""
    parts = []
    for piece in filter(None, _PIECES.split(template)):
        if piece in special_tokens:
            parts.append(piece)
        elif piece[0] == "{" and piece[-1] == "}":
            name = piece[1:-1]
            parts.append({"label": "LABEL", "region": "region"}.get(name) or name[0].upper())
        elif piece.startswith("<|") or parts[-1:] != ["LABEL"]:  # a label's pattern has the text behind it
            parts.append(json.dumps(piece))
    return " ".join(parts)


def _label_pattern(named: str) -> str:
    """Return the pattern of a label and of the text between it and its region."""
    behind = named.split("{label}")[1]
    behind = "" if behind.startswith("<|") else behind.partition("{")[0]
    return rf"[^\n<>\[\]|\x00-\x1f]{{1,{_LABEL}}}{re.escape(behind)}"
