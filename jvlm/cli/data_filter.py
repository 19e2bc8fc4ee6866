"""``jvlm data filter``: examples measured, shown as histograms, and left out by limits."""

from __future__ import annotations

import dataclasses

from jvlm.cli.data_prepare import Prepared
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFilter(Prepared):
    """Measure examples, and show histograms with the limits. Without --drop it only looks.

    The same folder goes on with what was measured: look first, then choose limits and add --drop.

    Attributes:
      drop: whether to write the examples within the limits as shards.
      min_side: pixels of the shorter side of each image.
      max_side: pixels of the longer side of each image.
      max_aspect: longer side of an image by its shorter one.
      min_words: words of all turns together; characters of Chinese or Japanese are words.
      max_words: see min_words.
      min_characters: characters of all turns together.
      max_characters: see min_characters.
      max_repetition: share of runs of three words that occur in the text more than once, 0 to 1.
      languages: codes of languages to keep, such as en.
      language: whether to find the language without a limit on it.
      min_language_probability: of the language that was found.
      model: a model of jvlm, Hugging Face's folder or a run, that gives the perplexity of the texts.
      max_tokens: of a text that count in its perplexity.
      min_perplexity: e to the mean loss of a token.
      max_perplexity: see min_perplexity.
      max_perplexity_share: share of the examples with the highest perplexity to drop, as 0.05.
    """

    drop: bool = False
    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    max_repetition: float | None = None
    languages: tuple[str, ...] = ()
    language: bool = False
    min_language_probability: float | None = None
    model: str | None = None
    max_tokens: int = 1024
    min_perplexity: float | None = None
    max_perplexity: float | None = None
    max_perplexity_share: float | None = None


def run(words: list[str]) -> int:
    options = parse(DataFilter, words, "jvlm data filter")

    from jvlm.data.prepare.filters import Limits, filter_examples

    limits = Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})
    perplexity = None
    if options.model is not None:
        from jvlm.inference.perplexity import TextPerplexity

        perplexity = TextPerplexity(options.model, options.max_tokens)
    done = filter_examples(
        options.files,
        options.output,
        limits,
        drop=options.drop,
        language=options.language,
        perplexity=perplexity,
        perplexity_of="" if perplexity is None else perplexity.identity,
        on_histograms=print,
        **options.shared(),
    )
    print(done.text())
    return 0
