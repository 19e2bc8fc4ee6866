"""ModelScope, through its own client (the extra ``jvlm[modelscope]``): the same folders, under ``modelscope://ORG/NAME``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jvlm.errors import UserError
from jvlm.hub.ids import HubId, Kind


def download(id: HubId, kind: Kind, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository on ModelScope, in that client's cache.

    Raises:
      UserError: the client is not installed, or does not find the repository.
    """
    client = _client(id)
    work = client.snapshot_download if kind == "model" else client.dataset_snapshot_download
    try:
        return Path(work(id.repo, revision=id.revision, allow_patterns=list(patterns)))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{id} cannot be had from ModelScope ({type(error).__name__}: {error})") from error


def upload(
    contents: Mapping[str, str | bytes], id: HubId, message: str, *, private: bool, token: str | None = None
) -> str:
    """Create the repository if there is none, and send files. Returns its address.

    Args:
      contents: path in the repository -> file of this disk, or the bytes themselves.
    """
    api = _client(id).HubApi(token=token)
    with tempfile.TemporaryDirectory(prefix="jvlm-upload-") as folder:  # the client sends folders only
        for name, content in contents.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                target.symlink_to(Path(content).absolute())
        api.create_repo(id.repo, repo_type="model", visibility="private" if private else "public", exist_ok=True)
        api.upload_folder(
            repo_id=id.repo, folder_path=folder, commit_message=message, repo_type="model", use_cache=False
        )
    return f"https://modelscope.cn/models/{id.repo}"


def _client(id: HubId) -> Any:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import dataset_snapshot_download, snapshot_download
    except ImportError as error:
        raise UserError(f"{id}: ModelScope is reached through its client: pip install 'jvlm[modelscope]'") from error
    return SimpleNamespace(
        HubApi=HubApi, snapshot_download=snapshot_download, dataset_snapshot_download=dataset_snapshot_download
    )
