"""ModelScope, through its own client (the extra ``jvlm[modelscope]``): the same folders, under ``modelscope://ORG/NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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


def upload(folder: Path, id: HubId, message: str, *, private: bool, token: str | None = None) -> str:
    """Create the repository if there is none, and send all files of a folder. Returns its address."""
    api = _client(id).HubApi(token=token)
    api.create_repo(id.repo, repo_type="model", visibility="private" if private else "public", exist_ok=True)
    api.upload_folder(repo_id=id.repo, folder_path=str(folder), commit_message=message, repo_type="model")
    return f"https://modelscope.cn/models/{id.repo}"


def _client(id: HubId) -> Any:
    try:
        import modelscope.hub.api
        import modelscope.hub.snapshot_download as snapshots
    except ImportError as error:
        raise UserError(f"{id}: ModelScope is reached through its client: pip install 'jvlm[modelscope]'") from error

    class Client:
        HubApi = modelscope.hub.api.HubApi
        snapshot_download = staticmethod(snapshots.snapshot_download)
        dataset_snapshot_download = staticmethod(snapshots.dataset_snapshot_download)

    return Client
