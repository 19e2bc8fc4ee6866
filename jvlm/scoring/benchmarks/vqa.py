"""VQA accuracy over ten annotators (VQAv2, OK-VQA, TextVQA, VizWiz; Antol et al., arXiv 1505.00468)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
).split()
# a form that lacks one of its apostrophes -> the form; one entry of the official table goes the other way
_RESTORED = {
    form[:at] + form[at + 1 :]: form for form in _CONTRACTIONS for at, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}
_PERIODS = 32  # the official code passes a flag as the largest number of full stops to take out


def vqa_accuracy(answer: str, golds: Sequence[str], *, always_normalise: bool = False) -> float:
    """Return the mean over annotators of min(1, others who gave this answer / 3).

    Args:
      golds: the answer of each annotator.
      always_normalise: also where all annotators agree, as lmms-eval does; the official code then compares as it is.
    """
    answer, golds = _line(answer), [_line(gold) for gold in golds]
    if always_normalise or len(set(golds)) > 1:
        answer, golds = normalise(answer), [normalise(gold) for gold in golds]
    same = sum(gold == answer for gold in golds)
    return sum(min(1.0, (same - (gold == answer)) / 3) for gold in golds) / len(golds)


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """Return an answer as the official code compares it: punctuation, numbers as digits, articles, contractions."""
    comma = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space or comma else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=_PERIODS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
