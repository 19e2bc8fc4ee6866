"""What an answer is worth, by the name of the metric; each takes all answers at once, some need a whole corpus."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jvlm.data.box_formats import FormatName
from jvlm.data.boxes import Box, CoordinateSpace, Sizes
from jvlm.evaluation.task import Item, Parser
from jvlm.scoring.answers import answer, normalise, spoken
from jvlm.scoring.benchmarks import (
    captions,
    documents,
    grounding,
    instructions,
    mathvista,
    mmmu,
    ocrbench_v2,
    reading,
    vqa,
)
from jvlm.scoring.choice import choice
from jvlm.scoring.counts import count
from jvlm.scoring.maths import MathVerifier
from jvlm.scoring.score import Score
from jvlm.scoring.spans import span
from jvlm.scoring.words import words


@dataclasses.dataclass(frozen=True)
class Answered:
    """A reply to an item, ready to be scored.

    Attributes:
      text: the reply, thinking and all.
      sizes: of each image, as given and as the model saw it.
      form, space: how the model was declared to write boxes.
    """

    item: Item
    text: str
    parser: Parser = "answer"
    sizes: tuple[Sizes, ...] = ()
    form: FormatName = "json"
    space: CoordinateSpace | None = None

    @property
    def options(self) -> list[str]:
        """The texts of the options."""
        return list(self.item.facts.get("options", ()))

    def read(self, *, as_written: bool = False) -> str | Score:
        """Return the answer in the reply, or the score of a reply without one; ``as_written`` as of `spoken`."""
        if self.parser == "first_line":
            line = self.text.strip().split("\n")[0].strip()
            return line or Score(0.0, "empty")
        reader = spoken if self.parser == "spoken" else answer
        return reader(self.text, as_written=as_written)


Many = Callable[[Sequence[Answered]], list[Score]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
      scores: the score of each answer, in order.
      corpus: whether a score depends on the other answers' references, so that a part of a task has other scores.
      about: what it is.
    """

    scores: Many
    about: str
    corpus: bool = False


def _each(one: Callable[[str, Answered], Score | float], *, as_written: bool = False) -> Many:
    """Return a metric of single answers; what has none is scored before."""

    def score(answered: Answered) -> Score:
        text = answered.read(as_written=as_written)
        if isinstance(text, Score):
            return text
        value = one(text, answered)
        return value if isinstance(value, Score) else Score(float(value), "ok" if value == 1 else "wrong", text[:200])

    return lambda many: [score(one) for one in many]


# metrics of texts whose reference is taken as it is written
_literal = functools.partial(_each, as_written=True)


def _golds(given: Answered) -> list[str]:
    gold = given.item.gold
    return [str(one) for one in gold] if isinstance(gold, list) else [str(gold)]


def _choice(text: str, given: Answered) -> Score:
    return choice(text, given.item.gold, given.options, prose=True)


def _mmmu(text: str, given: Answered) -> Score:
    if given.options:
        return mmmu.mmmu_choice(text, given.item.gold, given.options)
    return mmmu.mmmu_open(text, _golds(given))


def _count(text: str, given: Answered) -> Score:
    return count(text, int(_golds(given)[0]))


def _drop(text: str, given: Answered) -> float:
    return reading.drop_f1([text], [[str(s) for s in gold] for gold in given.item.gold])


def _ocrbench(text: str, given: Answered) -> float:
    return documents.ocrbench(text, _golds(given), formula=bool(given.item.facts.get("formula")))


def _ocrbench_v2(text: str, given: Answered) -> Score:
    return ocrbench_v2.score(text, str(given.item.facts["kind"]), given.item.facts, given.item.gold)


def _exact(text: str, given: Answered) -> Score:
    return words(text, _golds(given))


def _document(text: str, given: Answered) -> Score:
    """MiMo-VL's rule before its judge: lower case, a closing full stop off."""
    bare = text.strip().lower().rstrip(".").strip()
    return Score.of(bare in {gold.strip().lower().rstrip(".").strip() for gold in _golds(given)}, text[:200])


def _span(text: str, given: Answered) -> Score:
    found = span(text, given.item.gold)
    return found if found.parsed is not None or "[" in text else span(f"[{text.strip().strip('[]')}]", given.item.gold)


def _mathvista(text: str, given: Answered) -> Score:
    return mathvista.mathvista(text, _golds(given)[0], **given.item.facts)


def _dynamath(text: str, given: Answered) -> Score:
    return mathvista.dynamath(text, _golds(given)[0], str(given.item.facts["answer_type"]))


def _judgment(text: str, given: Answered) -> Score:
    """VL-RewardBench: which of two answers the reply calls better."""
    found = re.findall(r"answer\s*([12])\s*is\s*(?:the\s*)?(?:slightly\s*|much\s*)?better", text.replace("*", ""), re.I)
    if not found or len(set(found)) > 1:
        return Score(0.0, "several_answers" if found else "unparsed", found or None)
    return Score.of(found[0] == str(given.item.gold), found[0])


def _ifeval(text: str, given: Answered) -> Score:
    return instructions.follows(text, given.item.gold, str(given.item.facts.get("prompt", "")))


def _web(text: str, given: Answered) -> Score | float:
    """VisualWebBench: ROUGE-L of captions and texts, ROUGE-1 of answers, letters of choices."""
    kind = given.item.facts["task_type"]
    if kind == "webqa":
        return captions.rouge_1(text, _golds(given))
    if kind in ("web_caption", "heading_ocr", "element_ocr"):
        found = re.search(r'content="([^"]*)"', text)
        bare = found[1] if found and kind == "web_caption" else text.rpartition("rectangle bounding box is:")[2].strip()
        return captions.rouge_l(bare, _golds(given))
    return choice(text, given.item.gold, given.options or [""] * 8, prose=True)


def _box(text: str, given: Answered) -> Score:
    if not given.sizes:
        return Score(None, "no_image_size")
    gold = Box(*given.item.gold, "original")
    threshold = float(given.item.facts.get("threshold", 0.5))
    union = bool(given.item.facts.get("union"))
    return grounding.box_at_iou(
        text, gold, given.sizes[0], threshold=threshold, form=given.form, space=given.space, union=union
    )


def _point(text: str, given: Answered) -> Score:
    if not given.sizes:
        return Score(None, "no_image_size")
    gold, sizes = given.item.gold, given.sizes[0]
    if len(gold) == 4:
        box = Box(*gold, "original")
        return grounding.point_in_box(text, box, sizes, form=given.form, space=given.space)
    corners = list(zip(gold[::2], gold[1::2], strict=True))
    return grounding.point_in_polygon(text, corners, sizes, form=given.form, space=given.space)


def _names_one(text: str, given: Answered) -> Score:
    """Ferret's questions which of two things something is: the right name is there, and the wrong one is not."""
    content = f" {re.sub(r'[^a-z0-9]+', ' ', text.lower())} "

    def named(names: Sequence[str]) -> bool:
        return any(f" {re.sub(r'[^a-z0-9]+', ' ', name.lower()).strip()} " in content for name in names)

    right, wrong = named(_golds(given)), named(given.item.facts["wrong"])
    if right == wrong:
        return Score(0.0, "several_answers" if right else "unparsed", text[:200])
    return Score.of(right, text[:200])


def _cider(many: Sequence[Answered]) -> list[Score]:
    """CIDEr-D over 10, so that it is from 0 to 1; the unit of these tasks is 1000."""
    texts = [one.read(as_written=True) for one in many]
    given = ["" if isinstance(text, Score) else text for text in texts]
    values = captions.cider(given, [_golds(one) for one in many]) if many else []
    return [
        text if isinstance(text, Score) else Score(min(float(value) / 10, 1.0), "ok", text[:200])
        for text, value in zip(texts, values, strict=True)
    ]


_VERIFIER: list[MathVerifier] = []


@contextmanager
def verifier() -> Iterator[None]:
    """Hold the processes that compare mathematics, begun when first needed, until the end."""
    try:
        yield
    finally:
        while _VERIFIER:
            _VERIFIER.pop().close()


def _maths(many: Sequence[Answered]) -> list[Score]:
    if not _VERIFIER:
        _VERIFIER.append(MathVerifier())
    pairs = [(one.text, _golds(one)) for one in many]
    scores = _VERIFIER[0].scores([(text, gold) for text, golds in pairs for gold in golds])
    found, at = [], 0
    for _, golds in pairs:
        own = scores[at : at + len(golds)]
        at += len(golds)
        found.append(max(own, key=lambda score: -1 if score.value is None else score.value))
    return found


def _maths_or_choice(many: Sequence[Answered]) -> list[Score]:
    """MathVision and its like: letters where there are options, else mathematics."""
    letters = iter(_each(_choice)([one for one in many if one.options]))
    maths = iter(_maths([one for one in many if not one.options]))
    return [next(letters if one.options else maths) for one in many]


def _vqa(text: str, given: Answered, *, always: bool) -> float:
    return vqa.vqa_accuracy(text, _golds(given), always_normalise=always)


def _yes_no(text: str, given: Answered) -> Score:
    """POPE, MME: the first word is yes or no."""
    found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    if not found:
        return Score(0.0, "unparsed")
    return Score.of(found[1].lower() == normalise(_golds(given)[0]), found[1].lower())


METRICS: Mapping[str, Metric] = {
    "choice": Metric(_each(_choice), "the only option that the answer names is the right one"),
    "mmmu": Metric(_each(_mmmu), "MMMU's own reading of options and open answers, nothing drawn at random"),
    "anls": Metric(_literal(lambda t, g: documents.anls(t, _golds(g))), "ANLS, threshold 0.5"),
    "relaxed": Metric(_literal(lambda t, g: documents.relaxed(t, _golds(g))), "relaxed accuracy: within 5 %"),
    "exact_document": Metric(_literal(_document), "the same text but for case and a full stop"),
    "vqa": Metric(_literal(functools.partial(_vqa, always=False)), "VQA accuracy over annotators, official code"),
    "vqa_normalised": Metric(_literal(functools.partial(_vqa, always=True)), "VQA accuracy, answers always normalised"),
    "exact": Metric(_each(_exact), "the same words but for case and outer punctuation"),
    "table_answer": Metric(
        _literal(lambda t, g: documents.table_answer(t, _golds(g))), "all values of the reference and no other"
    ),
    "yes_no": Metric(_each(_yes_no), "begins with the right one of yes and no"),
    "count": Metric(_each(_count), "the only number is the right one"),
    "squad_f1": Metric(_literal(lambda t, g: reading.squad_f1(t, _golds(g))), "token F1 of SQuAD"),
    "drop_f1": Metric(_literal(_drop), "F1 of DROP, numbers must agree"),
    "ocrbench": Metric(_literal(_ocrbench), "a reference is part of the answer"),
    "ocrbench_v2": Metric(_literal(_ocrbench_v2), "by kind of question: parts of texts, trees of tables, boxes"),
    "box_iou50": Metric(_each(_box), "the only box has an IoU of 0.5 or more; in the declared space alone"),
    "point_in_box": Metric(_each(_point), "the only point, or centre of the only box, lies in the box"),
    "temporal_iou": Metric(_each(_span), "IoU of the only [mm:ss, mm:ss] with the span"),
    "maths": Metric(_maths, "Math-Verify, boxed first, strict, with a time limit"),
    "maths_or_choice": Metric(_maths_or_choice, "letters where there are options, else Math-Verify"),
    "mathvista": Metric(_each(_mathvista), "MathVista's comparison after a rule-based reading"),
    "dynamath": Metric(_each(_dynamath), "letter, or number within 0.001"),
    "judgment": Metric(_each(_judgment), "names the better one of two answers"),
    "ifeval": Metric(_literal(_ifeval), "every instruction of the prompt is followed, strict"),
    "visualwebbench": Metric(_literal(_web), "ROUGE of texts, letters of choices"),
    "names_one": Metric(_each(_names_one), "names the right one of two things, and not the other"),
    "cider": Metric(_cider, "CIDEr-D over the asked images' references", corpus=True),
    "rouge_l": Metric(_literal(lambda t, g: captions.rouge_l(t, _golds(g))), "ROUGE-L F measure"),
}
