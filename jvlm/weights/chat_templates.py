"""Chat templates of Hugging Face folders: which file counts, whether images can be written, and saving.

A model with images has a processor, whose template counts before the tokenizer's, as in transformers' AutoProcessor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jvlm.data.chat_format import ChatFormat
from jvlm.errors import UserError
from jvlm.json_files import read_object_if_there
from jvlm.weights.processor_files import PROCESSOR, nested_first

JINJA, LEGACY, ADDITIONAL = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
Templates = str | dict[str, str]


def choose(folder: Path, tokenizer: Any) -> tuple[Templates | None, Path]:
    """Return a folder's templates, one or by name, and the file they come from; None where there are none.

    Raises:
      UserError: files that transformers refuses together; templates none of which is the default one.
    """
    separate, nested = _separate(folder), _nested(folder)
    own = folder / JINJA
    candidates = [*((nested, separate) if nested_first() else (separate, nested))]
    candidates.append((tokenizer.chat_template, own if own.is_file() else folder / "tokenizer_config.json"))
    templates, source = next(((t, s) for t, s in candidates if t), (None, own))
    templates = _plain(templates, source)
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"{source}: the chat templates {', '.join(sorted(templates))} are named, and none is the default; "
            f"write that one to {own}"
        )
    return templates, source


def _separate(folder: Path) -> tuple[Templates | None, Path]:
    """Return the template with a file of its own, and those beside it."""
    named = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / ADDITIONAL).glob("*.jinja"))}
    if (folder / LEGACY).is_file():
        if named:
            raise UserError(
                f"{folder / LEGACY} and {folder / ADDITIONAL} exclude each other, in transformers too; "
                f"move the first to {JINJA}"
            )
        values = read_object_if_there(folder / LEGACY)
        if not values.get("chat_template"):
            raise UserError(f"{folder / LEGACY} holds no chat_template; write one or remove the file")
        return values["chat_template"], folder / LEGACY
    own = folder / JINJA
    if own.is_file():
        named["default"] = own.read_text(encoding="utf-8")
    return named, own if own.is_file() else folder / ADDITIONAL


def _nested(folder: Path) -> tuple[Templates | None, Path]:
    return read_object_if_there(folder / PROCESSOR).get("chat_template"), folder / PROCESSOR


def _plain(templates: Any, source: Path) -> Templates | None:
    """One template as a string, several by name; tokenizer_config.json has several as a list of objects."""
    if isinstance(templates, list) and all(isinstance(t, dict) and {"name", "template"} <= set(t) for t in templates):
        templates = {t["name"]: t["template"] for t in templates}
    texts = templates.values() if isinstance(templates, dict) else [templates]
    if templates is not None and not all(isinstance(text, str) for text in texts):
        raise UserError(f"{source}: chat_template is a {type(templates).__name__}; write a text, or texts by name")
    return templates["default"] if isinstance(templates, dict) and set(templates) == {"default"} else templates


def check_writes_images(tokenizer: Any, chat_format: ChatFormat, source: Path) -> None:
    """Raise UserError unless an image in a user turn becomes one placeholder."""
    if chat_format.inline:
        return  # placeholders are written among the words, not by the template
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    try:
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, which fails in as many ways
        raise _cannot_write(source, f"{type(error).__name__}: {error}") from error
    if text.count(chat_format.image) != 1:
        raise _cannot_write(source, f"it writes {text.count(chat_format.image)} {chat_format.image} for one image")


def _cannot_write(source: Path, problem: str) -> UserError:
    return UserError(
        f"{source}: this chat template cannot write an image ({problem}); put the template of the model's processor "
        f"into {source.parent / JINJA}"
    )


def write(folder: Path, templates: Templates) -> None:
    """Write the files of the templates, for readers of every age, and remove those that say something else.

    Processors of transformers before 4.57 read a file of one template, their tokenizers tokenizer_config.json.
    """
    named = templates if isinstance(templates, dict) else {"default": templates}
    beside = {name: text for name, text in named.items() if name != "default"}
    (folder / JINJA).write_text(named["default"], encoding="utf-8")
    for old in (folder / ADDITIONAL).glob("*.jinja"):
        if old.stem not in beside:
            old.unlink()
    for name, text in beside.items():
        (folder / ADDITIONAL).mkdir(exist_ok=True)
        (folder / ADDITIONAL / f"{name}.jinja").write_text(text, encoding="utf-8")
    if beside:
        (folder / LEGACY).unlink(missing_ok=True)
    else:
        if (folder / ADDITIONAL).is_dir() and not any((folder / ADDITIONAL).iterdir()):
            (folder / ADDITIONAL).rmdir()
        legacy = json.dumps({"chat_template": named["default"]}, indent=2, ensure_ascii=False) + "\n"
        (folder / LEGACY).write_text(legacy, encoding="utf-8")
