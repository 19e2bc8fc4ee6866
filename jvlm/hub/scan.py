"""What must not leave this machine: tokens, keys, and paths of its disk, in the text files of a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from jvlm.errors import UserError

# Every kind of text that is sent, whatever its name; tensors are not read.
_BINARY = (".safetensors", ".gguf", ".model", ".png", ".jpg", ".jpeg")
_SECRETS = {
    "a token of the Hugging Face Hub": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a token of ModelScope": re.compile(r"\bms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
    "an API key": re.compile(r"\b(?:sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16})\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
# A whole JSON string that is an absolute path, and a path below a folder of people's files anywhere.
_WHOLE_PATH = re.compile(r'"(?:file://)?(?:~?/|[A-Za-z]:\\\\)[^\s"<>|*?]+[/\\][^\s"<>|*?]*"')
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|Users|root|mnt|tmp|scratch|workspace)/[\w.-]+|[A-Za-z]:\\\\?Users\\)[\w./\\-]*"
)
# Words of these are the vocabulary's, and may look like anything.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


def check(folder: Path, files: Iterable[str], token: str | None = None, replaced: dict[str, str] | None = None) -> None:
    """Check text files before they are sent.

    Args:
      token: that of the user, which must be in none of them.
      replaced: texts that are sent in place of files.

    Raises:
      UserError: naming each file and line that holds a token, a key or an absolute path; never the secret itself.
    """
    problems = []
    here = {str(Path.home()), str(Path.cwd()), str(folder.absolute()), str(folder.resolve())}
    here = sorted(path for path in here if path.count("/") > 1)
    for name in files:
        if name.endswith(_BINARY):
            continue
        text = (replaced or {}).get(name)
        text = (folder / name).read_text(encoding="utf-8", errors="replace") if text is None else text
        for number, line in enumerate(text.splitlines(), 1):
            problems += [f"{name}, line {number}: {what}" for what in _in_line(line, name, token, here)]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"nothing was sent: files of {folder} hold what is of this machine or of you alone:\n  "
            + "\n  ".join(problems[:10])
            + f"{more}\nTake it out of these files. A base model is named by its id: train from ORG/NAME, or write "
            "the id into adapter_config.json, as base_model_name_or_path"
        )


def _in_line(line: str, name: str, token: str | None, here: list[str]) -> list[str]:
    secrets = [what for what, pattern in _SECRETS.items() if pattern.search(line)]
    if token and token in line and not secrets:
        secrets.append("your token")
    if Path(name).name not in _VOCABULARIES:
        match = _WHOLE_PATH.search(line) or _PATH.search(line)
        path = match[0] if match else next((path for path in here if path in line), None)
        if path is not None:
            secrets.append(f"the absolute path {path}")
    return secrets
