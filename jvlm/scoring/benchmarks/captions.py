"""Captions: CIDEr-D over a corpus (arXiv 1411.5726), and ROUGE-L."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jvlm.scoring.extras import require

_NGRAMS = 4
_SIGMA = 6.0
# marks that the evaluation of COCO captions takes out after splitting words as the Penn Treebank does
_PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ; ( ) { }".split())


def tokens(text: str) -> list[str]:
    """Return the words of a caption: split as in the Penn Treebank, in lower case, without punctuation."""
    words = require("nltk.tokenize").TreebankWordTokenizer().tokenize(text.replace("\n", " "))
    return [word.lower() for word in words if word not in _PUNCTUATION]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " N"]:
    """Return the CIDEr-D of each caption; its mean times 100 is what papers give.

    Words are weighted by how many of these images' references hold them, so that scores of a part of a task are not
    those of the whole.

    Args:
      references: of each image, in the order of ``captions``.
    """
    given = [_ngrams(tokens(caption)) for caption in captions]
    expected = [[_ngrams(tokens(reference)) for reference in of_image] for of_image in references]
    documents: Counter = Counter()
    for of_image in expected:
        documents.update({gram for counts in of_image for gram in counts})
    size = math.log(len(expected)) if len(expected) > 1 else 1.0

    def vectors(counts: Counter) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(_NGRAMS)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (size - math.log(max(1, documents[gram])))
        norms = [math.sqrt(sum(value * value for value in part.values())) for part in parts]
        return parts, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for counts, of_image in zip(given, expected, strict=True):
        one = vectors(counts)
        similar = [_similarity(one, vectors(reference)) for reference in of_image]
        scores.append(10 * sum(similar) / len(similar))
    return np.array(scores)


def _ngrams(words: list[str]) -> Counter:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _NGRAMS + 1) for start in range(len(words) - n + 1)
    )


def _similarity(one, other) -> float:
    """Mean over n of the clipped cosine, with a penalty on another length."""
    total = 0.0
    for part, reference, norm, reference_norm in zip(one[0], other[0], one[1], other[1], strict=True):
        value = sum(
            min(weight, reference[gram]) * reference[gram] for gram, weight in part.items() if gram in reference
        )
        total += value / (norm * reference_norm) if norm and reference_norm else 0.0
    return total / _NGRAMS * math.exp(-((one[2] - other[2]) ** 2) / (2 * _SIGMA**2))


def rouge_l(answer: str, golds: Sequence[str]) -> float:
    """Return the best ROUGE-L F measure with one of ``golds``."""
    scorer = require("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return max((scorer.score(gold, answer)["rougeL"].fmeasure for gold in golds), default=0.0)


def rouge_1(answer: str, golds: Sequence[str]) -> float:
    """Return the best ROUGE-1 F measure with one of ``golds``."""
    scorer = require("rouge_score.rouge_scorer").RougeScorer(["rouge1"])
    return max((scorer.score(gold, answer)["rouge1"].fmeasure for gold in golds), default=0.0)
