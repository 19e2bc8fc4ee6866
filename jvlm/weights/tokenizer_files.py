"""Tokenizer files that transformers 4.49, 4.57 and 5 read alike.

tokenizer.json holds the whole tokenizer. tokenizer_config.json must name a class that all of them have and that takes
tokenizer.json as it is, and special tokens in the form that all of them know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jvlm.json_files import read_object_if_there
from jvlm.weights.chat_templates import JINJA, Templates

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"
# Notes of transformers 5 about how it has loaded a tokenizer, which are no settings of it.
_NOTES = ("backend", "is_local", "local_files_only", "model_specific_special_tokens", "name_or_path")
# Earlier forms of what tokenizer.json and tokenizer_config.json say: some readers look here first.
_OLDER = ("added_tokens.json", "special_tokens_map.json")
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


def save(tokenizer: Any, folder: Path, templates: Templates, classes: tuple[str, ...] = ()) -> None:
    """Write a tokenizer, without its templates' files; vocabularies of another tokenizer in the folder are removed.

    Args:
      templates, classes: as of `make_portable`.
    """
    before = _vocabulary(folder)
    tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    make_portable(folder, templates, classes)
    if before is not None and before != _vocabulary(folder):
        for name in _VOCABULARIES:
            (folder / name).unlink(missing_ok=True)


def make_portable(folder: Path, templates: Templates | None = None, classes: tuple[str, ...] = ()) -> None:
    """Rewrite a folder's tokenizer_config.json for every version; without a tokenizer.json it stays as it is.

    Args:
      templates: written into it too, which is where tokenizers before transformers 4.57 look; None keeps what is there,
        or takes the file of the template.
      classes: tokenizer classes to keep (`HFFormat.tokenizer_classes`); every other becomes the generic one.
    """
    if not (folder / TOKENIZER).is_file() or not (folder / CONFIG).is_file():
        return
    whole, values = read_object_if_there(folder / TOKENIZER), read_object_if_there(folder / CONFIG)
    name = str(values.get("tokenizer_class") or _GENERIC).removesuffix("Fast")
    values["tokenizer_class"] = name if name in classes else _GENERIC
    # the generic class also gives token_type_ids, which these models do not take
    values["model_input_names"] = ["input_ids", "attention_mask"]
    _special_tokens(values)
    # before transformers 5 a tokenizer is changed to agree with this key
    values.pop("add_prefix_space", None)
    before = whole.get("pre_tokenizer") or {}
    if "add_prefix_space" in before:
        values["add_prefix_space"] = before["add_prefix_space"]
    values["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in whole.get("added_tokens", ())
    }
    for note in _NOTES:
        values.pop(note, None)
    if templates is None and "chat_template" not in values and (folder / JINJA).is_file():
        templates = (folder / JINJA).read_text(encoding="utf-8")
    if isinstance(templates, dict):
        values["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    elif templates is not None:
        values["chat_template"] = templates
    (folder / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for older in _OLDER:
        (folder / older).unlink(missing_ok=True)


def is_portable(folder: Path) -> bool:
    """Whether transformers before 5 reads a folder's tokenizer_config.json, as far as its own form can be told."""
    values = read_object_if_there(folder / CONFIG)
    llama = str(values.get("tokenizer_class")).startswith("LlamaTokenizer")
    needs_model = llama and values.get("add_prefix_space") is not None and not (folder / "tokenizer.model").is_file()
    form = values.get("tokenizer_class") != "TokenizersBackend" and not values.get("backend")
    return form and not needs_model and not isinstance(values.get("extra_special_tokens"), list)


def _special_tokens(values: dict[str, Any]) -> None:
    """Write a list under the older name, and tokens with names of their own as keys beside it."""
    extra = values.pop("extra_special_tokens", None) or []
    if isinstance(extra, dict):
        values.update(extra)
        extra = []
    known = values.pop("additional_special_tokens", None) or []
    tokens = [*known, *(token for token in extra if token not in known)]
    if tokens:
        values["additional_special_tokens"] = tokens


def _vocabulary(folder: Path) -> Any:
    return read_object_if_there(folder / TOKENIZER).get("model", {}).get("vocab")
