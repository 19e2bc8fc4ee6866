"""Grammars of requests as grammars of llguidance, with what is refused before anything is compiled."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from types import ModuleType
from typing import Any

from jvlm.data.box_formats import FORMATS
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.inference.box_grammar import box_grammar
from jvlm.inference.requests import Grammar

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
# Between the tokens of JSON. Without a limit models fill their answers with blanks.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,6}"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_REMOTE = re.compile(r'"\$(?:dynamic|recursive)?[rR]ef"\s*:\s*"(?!#)')


def require(name: str) -> ModuleType:
    """Return a module of the extra ``jvlm[serve]``. Raises UserError, saying what to install, if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"answers under a grammar need {error.name or name}: pip install 'jvlm[serve]'") from error


def grammar_text(grammar: Grammar, processor: Processor) -> str:
    """Return the grammar as llguidance takes it.

    Raises:
      UserError: one that is too large, too deep, refers to other documents, or is not of its kind at all.
    """
    matcher = require("llguidance").LLMatcher
    if grammar.kind == "json_object":
        return _schema(matcher, {"type": "object"})
    if grammar.kind == "boxes":
        return matcher.grammar_from_lark(_boxes(grammar, processor))
    if grammar.kind == "choice":
        if not grammar.choices or not all(isinstance(choice, str) and choice for choice in grammar.choices):
            raise UserError("grammar.choices must be a list of texts, none of them empty")
        _check_size(sum(len(choice.encode()) for choice in grammar.choices))
        return matcher.grammar_from_lark("start: " + " | ".join(_literal(choice) for choice in grammar.choices))
    value = grammar.value
    if not isinstance(value, str) or not value:
        raise UserError(f"grammar of kind {grammar.kind!r} has no value")
    _check_size(len(value.encode()))
    if grammar.kind == "json_schema":
        return _schema(matcher, _parsed(value))
    _check_depth(_nesting(value))
    if grammar.kind == "regex":
        return matcher.grammar_from_regex(value)
    if _REMOTE.search(value):
        raise UserError("the grammar refers to a schema elsewhere; only references that begin with # are followed")
    if "::=" not in value:
        return matcher.grammar_from_lark(value)
    convert = require("llguidance.gbnf_to_lark")
    try:
        return matcher.grammar_from_lark(convert.any_to_lark(value))
    except (convert.GbnfToLarkError, ValueError) as error:
        raise UserError(f"the grammar is not EBNF: {error}") from error


def within_pictures(grammar: Grammar, example: Example, processor: Processor) -> Grammar:
    """Return a grammar of boxes that stays within the pictures of a prompt, unless it says itself within what.

    Of several pictures the largest width and height count: the text does not say which one a box is of.

    Raises:
      UserError: there is no picture.
    """
    if grammar.kind != "boxes" or grammar.image_size is not None:
        return grammar
    if not example.sizes:
        raise UserError("a grammar of boxes needs a picture, or image_size")
    space = processor.config.box_space or FORMATS[processor.config.box_format].space
    sizes = [sizes.original if space == "original" else sizes.resized for sizes in example.sizes]
    return dataclasses.replace(grammar, image_size=(max(w for w, _ in sizes), max(h for _, h in sizes)))


def _schema(matcher: Any, schema: dict[str, Any]) -> str:
    return matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE})


def _parsed(text: str) -> dict[str, Any]:
    """Return a JSON schema. One that allows anything allows any object: else answers can be digits without end."""
    try:
        schema = json.loads(text)
    except RecursionError:
        _check_depth(MAX_DEPTH + 1)
    except ValueError as error:
        raise UserError(f"the schema is not JSON: {error}") from error
    if schema is True or schema == {}:
        return {"type": "object"}
    if not isinstance(schema, dict):
        raise UserError(f"the schema is a {type(schema).__name__}; it must be an object")
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        node, depth = pending.pop()
        _check_depth(depth)
        if isinstance(node, dict):
            for key in _REFERENCES:
                if isinstance(node.get(key), str) and not node[key].startswith("#"):
                    raise UserError(
                        f"the schema refers to {node[key][:100]!r}; only references that begin with # are followed"
                    )
            if "x-guidance" in node:
                raise UserError("the schema has a field x-guidance, which requests may not set")
        children = node.values() if isinstance(node, dict) else node
        pending += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return schema


def _boxes(grammar: Grammar, processor: Processor) -> str:
    if grammar.image_size is None:
        raise UserError("a grammar of boxes needs image_size, the width and height of the picture")
    tokens = processor.tokenizer.added_tokens_decoder.values()
    return box_grammar(
        processor.config.box_format,
        grammar.image_size,
        space=processor.config.box_space,
        special_tokens={token.content for token in tokens if token.special},
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _nesting(text: str) -> int:
    """Return how deep parentheses are nested; escaped ones do not count."""
    depth = most = 0
    for char in re.sub(r"\\.", "", text):
        depth += (char in "([{") - (char in ")]}")
        most = max(most, depth)
    return most


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise UserError(f"the grammar has {size} bytes, and at most {MAX_BYTES} are taken")


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UserError(f"the grammar is nested more than {MAX_DEPTH} levels deep; make it flatter")
