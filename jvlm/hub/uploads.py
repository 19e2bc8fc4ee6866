"""Sending a model's folder to a hub: chosen files, none with a secret, a card, retries."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi

from jvlm.errors import UserError
from jvlm.hub import card as cards
from jvlm.hub import downloads, errors, modelscope, scan
from jvlm.hub.ids import HubId, require_id

# What a reader of the model needs. Everything else in a folder (optimizer state, logs, curves) stays here.
_SENT = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.gguf", "README.md", "LICENSE*", "NOTICE*")
_NEVER_SENT = (
    *("experiment.json", "inputs.json", "frozen.json", "args.json", "hub.json", "scores.json", "trainer_state.json"),
    *("optimizer*", "scheduler*", "rng_state*", "training_args*", "tensor_names.json", "*.partial"),
)
_ADAPTER = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class UploadReport:
    """What was sent, or would be.

    Attributes:
      repo: id of the repository.
      files: (path, bytes) of each.
      left_out: files of the folder that are not sent.
      url: of the commit; None in a dry run.
    """

    repo: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...] = ()
    url: str | None = None

    def text(self) -> str:
        """Return lines for the terminal."""
        size = sum(size for _, size in self.files)
        state = "would be sent to" if self.url is None else "sent to"
        lines = [f"{len(self.files)} files, {size:,} bytes, {state} {self.url or self.repo}"]
        lines += [f"  {size:>16,}  {path}" for path, size in self.files]
        if self.left_out:
            shown = ", ".join(self.left_out[:8]) + (", ..." if len(self.left_out) > 8 else "")
            lines.append(f"not sent ({len(self.left_out)}): {shown}")
        return "\n".join(lines)


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    message: str = "Upload of jvlm",
    card: cards.Card | None = None,
    base_model: str | None = None,
    attempts: int = errors.ATTEMPTS,
) -> UploadReport:
    """Send a Hugging Face or PEFT folder to a repository, which is made if there is none.

    A folder without README.md gets a card. One attempt that fails is followed by others; files that arrived are not
    sent again.

    Args:
      repo_id: "ORG/NAME", or "modelscope://ORG/NAME".
      private: whether a new repository is.
      token: None takes that of the hub's own store, where `hf auth login` puts it. It is neither printed nor written.
      dry_run: send nothing, and look at no network.
      card: what README.md says; None takes what the folder's files say.
      base_model: id of the base, which an adapter's configuration then names in place of a folder of this disk.

    Raises:
      UserError: nothing to send; a file with a token or an absolute path in it, naming it; no permission.
      HubUnavailable: the hub could not be reached, or failed, at each attempt.
    """
    folder, id = Path(folder), require_id(repo_id)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that `jvlm export` or a training run wrote")
    sent, left_out = _chosen(folder)
    replaced = _replaced(folder, id, sent, card, base_model)
    sent = sorted({*sent, *replaced})
    scan.check(folder, sent, token or huggingface_hub.get_token(), replaced)
    contents = {path: replaced[path].encode() if path in replaced else str(folder / path) for path in sent}
    sizes = ((path, len(c) if isinstance(c, bytes) else (folder / path).stat().st_size) for path, c in contents.items())
    report = UploadReport(id.repo, tuple(sizes), tuple(left_out))
    if dry_run:
        return report
    if id.source == "modelscope":
        url = modelscope.upload(contents, id, message, private=private, token=token)
        return dataclasses.replace(report, url=url)
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    client = HfApi(endpoint=downloads.endpoint(), token=token, library_name="jvlm")
    try:
        errors.attempt(
            lambda: client.create_repo(id.repo, private=private, exist_ok=True), f"making {id.repo}", attempts=attempts
        )
        commit = errors.attempt(
            lambda: client.create_commit(id.repo, operations, commit_message=message, revision=id.revision),
            f"sending {folder} to {id.repo}",
            attempts=attempts,
        )
    except Exception as error:
        raise errors.translated(error, id, "model", client, sending=True) from error
    return dataclasses.replace(report, url=commit.commit_url)


def _chosen(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the files to send, and of the others."""
    sent, left_out = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SENT)
        is_private = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _NEVER_SENT)
        hidden = any(part.startswith(".") for part in Path(name).parts)
        (sent if wanted and not is_private and not hidden and name.count("/") < 2 else left_out).append(name)
    if not any(name.endswith((".safetensors", ".gguf")) for name in sent):
        raise UserError(f"{folder} holds no *.safetensors or *.gguf, so no model: give a folder that jvlm exported")
    return sent, left_out


def _replaced(
    folder: Path, id: HubId, sent: list[str], card: cards.Card | None, base_model: str | None
) -> dict[str, str]:
    """Texts that are sent in place of files, or beside them: the card, and a configuration that names the base."""
    replaced = {}
    if _ADAPTER in sent:
        config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        named = base_model or (card and card.base_model) or cards.base_id(base)
        if named and named != base:
            replaced[_ADAPTER] = json.dumps({**config, "base_model_name_or_path": named}, indent=2) + "\n"
    if card is not None or cards.CARD not in sent:
        card = card or cards.of_folder(folder)
        if card.base_model is None and base_model is not None:
            card = dataclasses.replace(card, base_model=base_model)
        replaced[cards.CARD] = card.text(id.repo)
    return replaced
