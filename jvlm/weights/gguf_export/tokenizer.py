"""A tokenizer as the keys of a GGUF file: words, their kinds, merges, special tokens and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jvlm.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTES = re.compile(r"<0x[0-9A-F]{2}>")


def add(writer: Any, tokenizer: Any, rows: int, pre_tokenizers: Mapping[str, str], begin: int | None = None) -> None:
    """Add the keys of a tokenizer.

    Args:
      writer: a `gguf.GGUFWriter`.
      tokenizer: a fast one of transformers.
      rows: of the embedding table; those without a word get an unused one.
      pre_tokenizers: expressions by which a tokenizer may split text, with llama.cpp's names of them.
      begin: the model's token that begins a text, where the tokenizer has none.

    Raises:
      UserError: a kind of tokenizer, or a way of splitting text, that llama.cpp has no name for.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise UserError(f"GGUF files of a {model['type']} tokenizer are not written; supported: BPE")
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in whole.get("added_tokens", ())}
    pieces = bool(model.get("byte_fallback"))
    kinds = [_kind(index, words, added, pieces, model.get("unk_token")) for index in range(rows)]
    tokens = [words.get(index, f"[PAD{index}]") for index in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, kinds, merges))
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(
            "\u2581" in tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
        )
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(whole.get("pre_tokenizer"), pre_tokenizers))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    _special(writer, tokenizer, begin)


def _kind(index: int, words: dict[int, str], added: dict[int, Any], pieces: bool, unknown: str | None) -> int:
    if index not in words:
        return _UNUSED
    if pieces and words[index] == unknown:
        return _UNKNOWN
    if index in added:
        return _CONTROL if added[index]["special"] else _USER
    return _BYTE if pieces and _BYTES.fullmatch(words[index]) else _NORMAL


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """Scores by which llama.cpp merges pieces: the earlier the merge that makes a word, the higher."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), number)
    return [
        -float(rank.get(token, len(merges))) if kind == _NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _pre_tokenizer(before: dict[str, Any] | None, names: Mapping[str, str]) -> str:
    parts = (before or {}).get("pretokenizers", [before] if before else [])
    patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    others = [part for part in parts if part["type"] not in ("Split", "ByteLevel")]
    if not patterns and not others and any(part.get("use_regex", True) for part in parts):
        return "gpt-2"
    if len(patterns) != 1 or others or patterns[0] not in names:
        shown = json.dumps(before)[:200]
        raise UserError(
            f"the tokenizer splits text in a way that llama.cpp has no name for here ({shown}); known: "
            f"{', '.join(['gpt-2', *names.values()])}. Serve the Hugging Face folder"
        )
    return names[patterns[0]]


def _special(writer: Any, tokenizer: Any, begin: int | None) -> None:
    ids = {
        writer.add_bos_token_id: begin if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add_id, value in ids.items():
        if value is not None:
            add_id(value)
    begins = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
