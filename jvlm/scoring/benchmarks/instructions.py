"""IFEval (arXiv 2311.07911): whether a reply follows instructions that a program can check, all 25 kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jvlm.scoring.extras import require
from jvlm.scoring.score import Score

_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
Check = Callable[[str, Mapping[str, Any]], bool]


def follows(text: str, instructions: Sequence[Mapping[str, Any]], prompt: str = "") -> Score:
    """Return 1 if all instructions are followed; ``parsed`` lists which of them are. Strict: the reply as it is.

    Args:
      instructions: the ``id`` of each and its ``kwargs``, as the benchmark's files have them.
      prompt: what was asked, for a reply that must begin with it.
    """
    unknown = [one["id"] for one in instructions if one["id"] not in CHECKS]
    if unknown:
        return Score(None, "gold_unusable", unknown)
    done = []
    for one in instructions:
        given = {name: value for name, value in (one.get("kwargs") or {}).items() if value is not None}
        done.append(bool(text.strip()) and CHECKS[one["id"]](text, {"prompt_to_repeat": prompt, **given}))
    return Score.of(all(done), done)


def _compared(count: int, given: Mapping[str, Any], number: str, relation: str = "relation") -> bool:
    """Whether a count is less than, or at least, what is asked for."""
    if given.get(relation, "at least") == "less than":
        return count < int(given[number])
    return count >= int(given[number])


def _existence(text: str, given: Mapping[str, Any]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in given["keywords"])


def _frequency(text: str, given: Mapping[str, Any]) -> bool:
    found = re.findall(re.escape(given["keyword"].strip()), text, re.IGNORECASE)
    return _compared(len(found), given, "frequency")


def _forbidden(text: str, given: Mapping[str, Any]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in given["forbidden_words"])


def _letters(text: str, given: Mapping[str, Any]) -> bool:
    return _compared(text.lower().count(given["letter"].lower()), given, "let_frequency", "let_relation")


def _language(text: str, given: Mapping[str, Any]) -> bool:
    return _detected(text) in (given["language"], None)


def _detected(text: str) -> str | None:
    """Return the language of a text, ISO 639-1; None where there is nothing to tell it by."""
    langdetect = require("langdetect")
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def _sentences(text: str, given: Mapping[str, Any]) -> bool:
    tokenizer = require("nltk.tokenize.punkt").PunktSentenceTokenizer()
    return _compared(len(tokenizer.tokenize(text)), given, "num_sentences")


def _words(text: str, given: Mapping[str, Any]) -> bool:
    return _compared(len(re.findall(r"\w+", text)), given, "num_words")


def _paragraphs(text: str, given: Mapping[str, Any]) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and sum(map(bool, map(str.strip, parts))) == int(given["num_paragraphs"])


def _first_word(text: str, given: Mapping[str, Any]) -> bool:
    parts = [part.strip() for part in text.split("\n\n")]
    nth = int(given["nth_paragraph"])
    if sum(map(bool, parts)) != int(given["num_paragraphs"]) or nth > len(parts) or not parts[nth - 1]:
        return False
    word = re.match(r"[^.,?!'\"]*", parts[nth - 1].split()[0].lstrip("'").lstrip('"'))
    return word is not None and word[0].lower() == given["first_word"].lower()


def _placeholders(text: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= int(given["num_placeholders"])


def _postscript(text: str, given: Mapping[str, Any]) -> bool:
    marker = given["postscript_marker"].strip()
    form = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}.get(
        marker, rf"\s*{re.escape(marker.lower())}.*$"
    )
    return re.search(form, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, given: Mapping[str, Any]) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == int(given["num_bullets"])


def _constrained(text: str, given: Mapping[str, Any]) -> bool:
    return any(one in text.strip() for one in _ANSWERS)


def _highlights(text: str, given: Mapping[str, Any]) -> bool:
    single = [one for one in re.findall(r"\*[^\n\*]*\*", text) if one.strip("*").strip()]
    double = [one for one in re.findall(r"\*\*[^\n\*]*\*\*", text) if one[2:-2].strip()]
    return len(single) + len(double) >= int(given["num_highlights"])


def _sections(text: str, given: Mapping[str, Any]) -> bool:
    found = re.split(rf"\s?{re.escape(given['section_spliter'].strip())}\s?\d+\s?", text)
    return len(found) - 1 >= int(given["num_sections"])


def _json(text: str, given: Mapping[str, Any]) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Mapping[str, Any]) -> bool:
    return any(one.strip("<>").strip() for one in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, given: Mapping[str, Any]) -> bool:
    parts = text.split("******")
    valid = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(valid) == 2 and valid[0] != valid[1]


def _repeat(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


def _end(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(text: str, given: Mapping[str, Any]) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, given: Mapping[str, Any]) -> bool:
    words = require("nltk.tokenize").TreebankWordTokenizer().tokenize(text)
    return _compared(sum(map(str.isupper, words)), given, "capital_frequency", "capital_relation")


def _upper(text: str, given: Mapping[str, Any]) -> bool:
    return text.isupper() and _detected(text) in ("en", None)


def _lower(text: str, given: Mapping[str, Any]) -> bool:
    return text.islower() and _detected(text) in ("en", None)


def _no_comma(text: str, given: Mapping[str, Any]) -> bool:
    return "," not in text


CHECKS: Mapping[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_comma,
}
