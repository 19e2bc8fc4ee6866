"""Tokenizers of local folders, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jvlm import json_files
from jvlm.errors import UserError

# One of these holds the vocabulary.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt", "tekken.json")
# which takes a third of a second to read, and which transformers refuses if it is damaged
_LARGE = "tokenizer.json"
_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a folder.

    Raises:
      UserError: no folder, no vocabulary in it, or a file that cannot be read, naming it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES)}); copy the whole folder again")
    for name in _JSON:
        json_files.read_object_if_there(folder / name)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        json_files.read_object_if_there(folder / _LARGE)
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        files = ", ".join(name for name in dict.fromkeys((*_VOCABULARIES, *_JSON)) if (folder / name).is_file())
        raise UserError(
            f"{folder}: transformers cannot read the tokenizer ({message}); one of {files} is damaged: copy them again"
        ) from error
