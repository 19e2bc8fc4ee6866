"""What is worth a look in a source: answers that come too often, questions answered in two ways, odd boxes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from jvlm.data.contents import Contents

_FIRST = 3  # examples named
_REMEMBERED = 200_000  # examples of a source whose questions are compared
_LEAST = 20  # examples of which an answer's share says something
_SHARE = 0.2  # of the examples, above which an answer comes often
_ANSWERS = 3  # shown of those
_SMALL, _LARGE = 0.01, 0.9  # of an image that a box covers


@dataclasses.dataclass(frozen=True)
class Remark:
    """A sentence, and pairs or single examples that it is about, by index."""

    text: str
    examples: tuple[tuple[int, ...], ...] = ()


class Remarks:
    """Finds them over the usable examples of a source; questions of the first 200,000 are compared."""

    def __init__(self):
        self._examples = 0
        self._answers: Counter[bytes] = Counter()
        self._shown: dict[bytes, str] = {}
        self._first: dict[bytes, tuple[bytes, int]] = {}  # by question
        self._pairs: dict[str, list[tuple[int, ...]]] = {"equal": [], "other": [], "control": []}
        self._counts: Counter[str] = Counter()
        self._control: str | None = None

    def add(self, index: int, contents: Contents) -> None:
        """Take an example."""
        self._examples += 1
        if contents.answer:
            self._answers[contents.answer] += 1
            self._shown.setdefault(contents.answer, contents.shown)
        known = self._first.get(contents.question)
        if known is not None:
            self._note("equal" if known[0] == contents.answer else "other", known[1], index)
        elif len(self._first) < _REMEMBERED:
            self._first[contents.question] = contents.answer, index
        if contents.control is not None:
            self._control = self._control or contents.control
            self._note("control", index)
        for share in contents.boxes:
            kind = "flat" if not share else "small" if share < _SMALL else "large" if share > _LARGE else "usual"
            self._counts.update(("boxes", kind))

    def _note(self, kind: str, *indices: int) -> None:
        self._counts[kind] += 1
        if len(self._pairs[kind]) < _FIRST:
            self._pairs[kind].append(indices)

    def found(self) -> Iterator[Remark]:
        """Yield the remarks."""
        counts, answered = self._counts, self._answers.total()
        for answer, count in self._answers.most_common(_ANSWERS):
            if answered >= _LEAST and count > _SHARE * answered:
                yield Remark(
                    f"{count:,} of {answered:,} answers ({100 * count / answered:.0f} %) are {self._shown[answer]!r}: "
                    "so many are right without a look at the image"
                )
        said = {
            "other": "with a question that an earlier one asks of the same images, and another answer",
            "equal": "that repeat an earlier one, with the same images and answer",
            "control": f"that spell a control token, as {self._control!r}, which is read as words",
        }
        for kind, text in said.items():
            if counts[kind]:
                yield Remark(f"examples {text}: {counts[kind]:,}", tuple(self._pairs[kind]))
        odd = {
            "flat": "without area",
            "small": f"of less than {100 * _SMALL:.0f} % of their image",
            "large": f"of more than {100 * _LARGE:.0f} % of it",
        }
        found = [f"{counts[kind]:,} {text}" for kind, text in odd.items() if counts[kind]]
        if found:
            yield Remark(f"of {counts['boxes']:,} boxes {', '.join(found)}")
