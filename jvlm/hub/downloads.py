"""Folders of models and datasets from a hub: only what is read here, pinned to a commit, whole and checked."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants

from jvlm.errors import UserError
from jvlm.hub import errors, modelscope
from jvlm.hub.ids import HubId, Kind, is_hub_id, require_id
from jvlm.units import GIB

# What is read of a model's repository: not the weights of other libraries, nor what lies in folders of other formats.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*")
_FOLDERS = ("", "additional_chat_templates", "processor")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What this process has asked for before: all of it sees one commit, and asks once.
_commits: dict[tuple, str] = {}
_folders: dict[tuple, Path] = {}
_unreachable: set[str] = set()  # addresses of hubs


@dataclasses.dataclass(frozen=True)
class RepoFile:
    """A file of a repository.

    Attributes:
      size: bytes.
      digest: its SHA-256 if it is stored apart (LFS), else the SHA-1 that git has of it.
    """

    path: str
    size: int
    digest: str


def endpoint() -> str:
    """Return the address of the Hugging Face Hub: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def api() -> HfApi:
    """Return a client of the Hub. It takes the token from the Hub's own store."""
    return HfApi(endpoint=endpoint(), library_name="jvlm")


def download(
    source: str | os.PathLike, *, revision: str | None = None, kind: Kind = "model", weights: bool = True
) -> Path:
    """Return the folder of a model or dataset: ``source`` itself if that exists, else the files of the repository.

    They are in the Hub's own cache, where a second call, and every other program, finds them. With HF_HUB_OFFLINE=1,
    and for a commit that is there, no network is used.

    Args:
      source: a folder; or "ORG/NAME", "ORG/NAME@REVISION", "modelscope://ORG/NAME".
      revision: branch, tag or commit, if ``source`` has none.
      kind: of a model only what is read here is fetched; of a dataset all files (`jvlm.hub.datasets` fetches a part).
      weights: whether the tensors are wanted too.

    Raises:
      UserError: neither a folder nor an id; no such repository or revision, naming near ones; one that needs a login;
        nothing in it that can be read; too little space.
      HubUnavailable: the hub cannot be reached, and the cache does not have it.
    """
    if not is_hub_id(source):
        if Path(source).exists():
            return Path(source)
        require_id(source)
    id = require_id(source, revision)
    if id.source == "modelscope":
        return modelscope.download(id, kind, _SMALL + (("*.safetensors",) if weights else ()))
    pinned = resolve(id, kind)
    key = (*_here(pinned, kind), weights)
    if key not in _folders:
        listed = files_of(pinned, kind)
        if listed is None:
            _folders[key] = _cached(pinned, kind)
        else:
            _folders[key] = fetch(pinned, kind, listed if kind == "dataset" else _chosen(pinned, listed, weights))
            remember(id, kind, pinned)
    return _folders[key]


def resolve(id: HubId, kind: Kind = "model") -> HubId:
    """Return the id at its commit, which a restart can ask for again.

    Without a network it is the commit that the cache has for that revision, and a line says so.

    Raises: as `download`.
    """
    if id.is_pinned:
        return id
    if id.source == "modelscope":
        return id.at(id.revision or "master")
    key = _here(id, kind)
    if key not in _commits:
        _commits[key] = _commit_of(id, kind)
    return id.at(_commits[key])


def _commit_of(id: HubId, kind: Kind) -> str:
    client = api()
    if constants.HF_HUB_OFFLINE:
        return _cached_commit(id, kind, None)
    try:
        info = errors.attempt(
            lambda: client.repo_info(id.repo, repo_type=kind, revision=id.revision),
            f"looking for {id} on {endpoint()}",
            attempts=3,
        )
    except Exception as error:
        if not errors.is_transient(error):
            raise errors.translated(error, id, kind, client) from error
        commit = _cached_commit(id, kind, error)
        _unreachable.add(endpoint())
        print(f"{endpoint()} cannot be reached ({errors.reason(error)}); {id} is taken from the cache, at {commit}")
        return commit
    return info.sha


def files_of(id: HubId, kind: Kind) -> list[RepoFile] | None:
    """Return the files of a repository at a commit; None where there is no network to ask, nor an earlier answer."""
    path = notes(id, kind) / f"{id.revision}.json"
    if path.is_file():  # the list of a commit never changes
        return [RepoFile(*entry) for entry in json.loads(path.read_text())]
    if constants.HF_HUB_OFFLINE or endpoint() in _unreachable:
        return None
    client = api()
    try:
        files = errors.attempt(lambda: _listed(client, id, kind), f"listing {id.repo}", attempts=2)
    except Exception as error:
        if errors.is_transient(error) and _snapshot(id, kind).is_dir():
            return None
        raise errors.translated(error, id, kind, client) from error
    _write(path, json.dumps([dataclasses.astuple(file) for file in files]))
    return files


def _listed(client: HfApi, id: HubId, kind: Kind) -> list[RepoFile]:
    tree = client.list_repo_tree(id.repo, recursive=True, revision=id.revision, repo_type=kind)
    files = [entry for entry in tree if hasattr(entry, "size")]
    return [RepoFile(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in files]


def fetch(id: HubId, kind: Kind, files: Sequence[RepoFile]) -> Path:
    """Return the folder with some files of a repository at a commit. New ones are compared with the Hub's digests."""
    client = api()
    new = [file for file in files if _in_cache(id, kind, file.path) is None]
    _check_space(id, new)
    if new:
        print(f"downloading {id.repo}: {len(new)} files, {sum(f.size for f in new) / GIB:.2f} GiB")
    else:
        return _snapshot(id, kind)
    patterns = [glob.escape(file.path) for file in files]

    def snapshot() -> str:
        folder = huggingface_hub.snapshot_download(
            id.repo, repo_type=kind, revision=id.revision, allow_patterns=patterns, endpoint=endpoint()
        )
        lacking = [file.path for file in files if not Path(folder, file.path).is_file()]
        if lacking:
            raise ConnectionError(f"{len(lacking)} files did not arrive, first {lacking[0]}")
        return folder

    try:
        folder = Path(errors.attempt(snapshot, f"downloading {id.repo}"))
    except Exception as error:
        raise errors.translated(error, id, kind, client) from error
    wrong = [file for file in new if _digest(folder / file.path, file.digest) != file.digest]
    for file in wrong:  # neither the link nor what it points to stays, so that they are fetched again
        (folder / file.path).resolve().unlink()
        (folder / file.path).unlink(missing_ok=True)
    if wrong:
        raise errors.HubUnavailable(
            f"{id}: {', '.join(f.path for f in wrong)} did not arrive as {endpoint()} has them (other digests), and "
            "are removed; run the same command again"
        )
    return folder


def _chosen(id: HubId, listed: Sequence[RepoFile], weights: bool) -> list[RepoFile]:
    """Return the files of a model that are read."""
    here = [file for file in listed if os.path.dirname(file.path) in _FOLDERS]
    names = {file.path: file for file in here}
    small = [f for f in here if any(fnmatch.fnmatchcase(os.path.basename(f.path), p) for p in _SMALL)]
    small = [file for file in small if not file.path.endswith(".bin.index.json")]
    if not any(name in names for name in ("config.json", "adapter_config.json", "tokenizer_config.json")):
        more = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(
            f"{endpoint()}/{id.repo} holds no model: neither config.json nor adapter_config.json; it has {more}"
        )
    if not weights:
        return small
    tensors = [file for file in here if file.path.endswith(".safetensors")]
    if _SINGLE in names:
        tensors = [f for f in tensors if not f.path.startswith("model-") and f.path != "consolidated.safetensors"]
    elif _INDEX in names:
        index = fetch(id, "model", [names[_INDEX]]) / _INDEX
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        tensors = [f for f in tensors if f.path in wanted or f.path.startswith("adapter")]
    others = [f.path for f in here if f.path.endswith((".bin", ".pt", ".pth", ".h5", ".gguf", ".msgpack"))]
    if others and not tensors:
        raise UserError(
            f"{endpoint()}/{id.repo} has no *.safetensors, and {others[0]} is not read: save it with transformers, "
            "which writes safetensors, or give another repository"
        )
    return [*small, *tensors]


def _here(id: HubId, kind: Kind) -> tuple:
    """Return what an answer about an id holds for: this hub, and this cache."""
    return (id, kind, endpoint(), constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)


def remember(id: HubId, kind: Kind, pinned: HubId) -> None:
    """Note in the cache which commit a branch or tag was at, as the Hub's client does, for when there is no network."""
    if id.is_pinned:
        return
    _write(_folder(id, kind) / "refs" / (id.revision or "main"), str(pinned.revision))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    part.write_text(text)
    part.replace(path)


def notes(id: HubId, kind: Kind) -> Path:
    """Return the folder in the cache for what jvlm makes of a repository's files."""
    return _folder(id, kind) / "jvlm"


def _folder(id: HubId, kind: Kind) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{id.repo.replace('/', '--')}"


def _snapshot(id: HubId, kind: Kind) -> Path:
    return _folder(id, kind) / "snapshots" / str(id.revision)


def _in_cache(id: HubId, kind: Kind, path: str) -> str | None:
    cached = huggingface_hub.try_to_load_from_cache(id.repo, path, revision=id.revision, repo_type=kind)
    return cached if isinstance(cached, str) else None


def _cached_commit(id: HubId, kind: Kind, cause: Exception | None) -> str:
    """Return the commit that the cache has for a revision. Raises UserError or HubUnavailable."""
    ref = _folder(id, kind) / "refs" / (id.revision or "main")
    if ref.is_file():
        return ref.read_text().strip()
    if cause is None:
        raise UserError(
            f"{id} is not a folder here, HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have it: "
            f"download it on a machine with a network (hf download {id.repo}), or unset HF_HUB_OFFLINE"
        )
    raise errors.translated(cause, id, kind, api()) from cause


def _cached(id: HubId, kind: Kind) -> Path:
    """Return a snapshot that was downloaded before. Raises UserError if it was not."""
    folder = _snapshot(id, kind)
    if not folder.is_dir():
        raise UserError(
            f"{id} was never downloaded to {constants.HF_HUB_CACHE}, and there is no network: unset HF_HUB_OFFLINE"
        )
    return folder


def _check_space(id: HubId, files: Iterable[RepoFile]) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    size, free = sum(file.size for file in files), shutil.disk_usage(cache).free
    if size > free:
        raise UserError(
            f"{id.repo} is {size / GIB:.2f} GiB more to download, but {cache} has {free / GIB:.2f} GiB free; make "
            "room, or set HF_HOME to a larger disk"
        )


def _digest(path: Path, like: str) -> str:
    """SHA-256 of a file, or the SHA-1 that git has of it, as ``like`` is one of these."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
