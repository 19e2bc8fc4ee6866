"""Questions of common kinds out of the records of benchmarks."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvlm.data.content import Image, Part, Text, Video
from jvlm.data.errors import ExampleError
from jvlm.evaluation.files import Row, as_list
from jvlm.evaluation.task import Item

IDS = ("question_id", "questionId", "index", "id", "idx", "pid", "qid", "ID")
IMAGES = ("image", "images", "image_path", "decoded_image")
LETTERS = string.ascii_uppercase
_MARK = re.compile(r"<image ?(\d+)>")
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*")


def key(row: Row, *names: str) -> str:
    """Return the name of a record: a field's, or its file and number there."""
    found = row.get(*(names or IDS))
    return f"{Path(row.origin.file).stem}:{row.origin.number}" if found is None else str(found)


def content(row: Row, text: str, *, images: Sequence[str] = IMAGES, video: Sequence[str] = ()) -> tuple[Part, ...]:
    """Return media, then text; images that the text names as <image 1> stand where they are named."""
    media: tuple[Part, ...] = (row.video(*video, suffix=".mp4"),) if video else row.images(*images)
    return interleaved(text, [part for part in media if isinstance(part, Image)]) or (*media, Text(text))


def interleaved(text: str, images: Sequence[Image]) -> tuple[Part, ...] | None:
    """Return text with images in place of <image 1>, <image 2>, ...; None where it names none that is there."""
    pieces = _MARK.split(text)
    named = {int(number) for number in pieces[1::2]}
    if not any(1 <= number <= len(images) for number in named):
        return None
    parts: list[Part] = [image for number, image in enumerate(images, 1) if number not in named]
    shown: set[int] = set()
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            parts.append(Text(piece))
        elif int(piece) not in shown and 1 <= int(piece) <= len(images):
            shown.add(int(piece))
            parts.append(images[int(piece) - 1])
        else:
            parts.append(Text(f"<image {piece}>"))
    return tuple(part for part in parts if not isinstance(part, Text) or part.text)


def categories(row: Row, fields: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return the categories of a record.

    Args:
      fields: category -> field, or fields that are their own names.
    """
    pairs = fields.items() if isinstance(fields, Mapping) else ((name, name) for name in fields)
    return {name: str(value) for name, field in pairs if (value := row.get(field)) is not None}


def open_item(
    *,
    question: Sequence[str] = ("question", "query", "prompt"),
    answers: Sequence[str] = ("answers", "answer"),
    images: Sequence[str] = IMAGES,
    video: Sequence[str] = (),
    ids: Sequence[str] = IDS,
    parts: Mapping[str, str] | Sequence[str] = (),
    group: Sequence[str] = (),
    template: str = "{question}",
    where: Mapping[str, Any] | None = None,
) -> Callable[[Row], Item | None]:
    """Return a reader of questions with an answer in words; ``gold`` is the list of right answers.

    Args:
      parts: fields of categories.
      where: values of fields that a record must have to be part of the task.
    """

    def read(row: Row) -> Item | None:
        if not holds(row, where):
            return None
        golds = [_answer(one) for one in as_list(row.need(*answers))]
        text = template.format(question=row.text(*question))
        shown = content(row, text, images=images, video=video)
        own = categories(row, parts)
        return Item(
            key(row, *ids), shown, golds, answer=golds[0], group=str(row.get(*group, default="")), categories=own
        )

    return read


def holds(row: Row, where: Mapping[str, Any] | None) -> bool:
    """Return whether a record has the values asked for, each one value or a tuple of them."""
    for name, wanted in (where or {}).items():
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        if str(row.get(name)).lower() not in {str(one).lower() for one in wanted}:
            return False
    return True


def _answer(value: Any) -> str:
    """Return an annotator's answer, which some files wrap."""
    return str(value.get("answer", value)) if isinstance(value, Mapping) else str(value)


def choice_item(
    *,
    question: Sequence[str] = ("question", "query", "prompt", "text"),
    options: Sequence[str] = ("options", "choices", "option", "candidates"),
    answer: Sequence[str] = ("answer", "label", "correct_choice"),
    images: Sequence[str] = IMAGES,
    video: Sequence[str] = (),
    ids: Sequence[str] = IDS,
    parts: Mapping[str, str] | Sequence[str] = (),
    group: Sequence[str] = (),
    hint: str = "",
    listed: bool = True,
    numbered: bool = False,
    where: Mapping[str, Any] | None = None,
) -> Callable[[Row], Item | None]:
    """Return a reader of multiple choice; ``gold`` is a letter, ``facts["options"]`` are the texts.

    Options are a list, the text of a list, or columns A, B, ... and choice_A, choice_a, ...; the answer is a letter,
    "(A)", the number of an option from 0, or the text of one.

    Args:
      hint: field of what is said before the question.
      listed: whether options are to be listed; False where the question does so itself.
      numbered: whether answers are numbers of options, from 0, even where an option is that number.
    """

    def read(row: Row) -> Item | None:
        if not holds(row, where):
            return None
        texts = options_of(row, options)
        right = row.need(*answer)
        gold = letter_of(row, int(right) if numbered else right, texts)
        text = row.text(*question)
        if hint and row.get(hint):
            text = f"{row.text(hint)}\n{text}"
        if listed and texts:
            text += "\n" + "\n".join(f"{letter}. {one}" for letter, one in zip(LETTERS, texts, strict=False))
        return Item(
            key(row, *ids),
            content(row, text, images=images, video=video),
            gold,
            {"options": texts},
            answer=gold,
            group=str(row.get(*group, default="")),
            categories=categories(row, parts),
        )

    return read


def options_of(row: Row, names: Sequence[str] = ("options", "choices", "option")) -> list[str]:
    """Return the texts of the options of a record, without their letters; none where it has none."""
    found = [str(one) for one in row.list(*names)]
    if len(found) == 1 and "\n" in found[0]:
        found = [line for line in found[0].split("\n") if line.strip()]
    if not found:
        for form in ("{}", "choice_{}", "option_{}"):
            for letters in (LETTERS, LETTERS.lower()):
                columns = [row.get(form.format(letter)) for letter in letters]
                found = [str(one) for one in columns[: next((i for i, c in enumerate(columns) if c is None), 26)]]
                if len(found) > 1:
                    return found
        return []
    lettered = [_LETTERED.match(one) for one in found]
    if all(match is not None and match[1] == letter for match, letter in zip(lettered, LETTERS, strict=False)):
        return [one[match.end() :].strip() for one, match in zip(found, lettered, strict=True) if match]
    return [one.strip() for one in found]


def letter_of(row: Row, answer: Any, options: Sequence[str]) -> str:
    """Return the letter of the right option. Raises ExampleError where the answer names none."""
    letters = LETTERS[: len(options) or 26]
    if isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, int | float) and int(answer) == answer and 0 <= answer < len(letters):
        return letters[int(answer)]
    text = str(answer).strip()
    if text in options:
        return letters[list(options).index(text)]
    bare = text.strip("().: ").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    if bare.isdigit() and int(bare) < len(letters):
        return letters[int(bare)]
    match = _LETTERED.match(text)
    if match and match[1] in letters:
        return match[1]
    folded = [one.casefold() for one in options]
    if text.casefold() in folded:
        return letters[folded.index(text.casefold())]
    problem = f"answer {text[:40]!r} is none of its {len(options)} options"
    raise ExampleError(row.origin, "answer", problem, "Copy the file again, or leave the record out")


def media_of(parts: Sequence[Part]) -> list[Image | Video]:
    """Return the images and videos of a content."""
    return [part for part in parts if isinstance(part, Image | Video)]
