"""Ids of repositories: "ORG/NAME", "ORG/NAME@REVISION", with the hub in front if it is another: "modelscope://ORG/NAME".

Of a dataset also a subset, a split and a number of examples: "ORG/NAME@REVISION:SUBSET:SPLIT#N".
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from jvlm.errors import UserError

Kind = Literal["model", "dataset"]
Source = Literal["hf", "modelscope"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_ID = re.compile(rf"(?:(?P<source>hf|modelscope)://)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?")
_DATASET = re.compile(rf"(?P<id>{_ID.pattern})(?::(?P<subset>[^:#]+))?(?::(?P<split>[^:#]+))?(?:#(?P<count>\d+))?")
# of data files, which are no repositories
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".arrayrecord")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class HubId:
    """A repository on a hub.

    Attributes:
      repo: "ORG/NAME".
      revision: branch, tag or commit; None is the main branch.
      source: which hub.
    """

    repo: str
    revision: str | None = None
    source: Source = "hf"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> HubId:
        """Return the same repository at another revision."""
        return dataclasses.replace(self, revision=revision)

    @property
    def address(self) -> str:
        """The id with its hub in front, which cannot be taken for a folder."""
        return f"{self.source}://{self.repo}" + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        source = "" if self.source == "hf" else f"{self.source}://"
        return f"{source}{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclasses.dataclass(frozen=True)
class DatasetId:
    """A dataset on a hub, or a part of one.

    Attributes:
      subset: the configuration of the dataset's card, or one of its folders; None is the default one.
      split: "train" where none is given.
      count: how many examples; None is all.
    """

    id: HubId
    subset: str | None = None
    split: str | None = None
    count: int | None = None

    def __str__(self) -> str:
        return self._text(str(self.id))

    @property
    def address(self) -> str:
        """The dataset with its hub in front, which cannot be taken for a file."""
        return self._text(self.id.address)

    def _text(self, id: str) -> str:
        parts = [id, self.subset or ("default" if self.split else None), self.split]
        return ":".join(part for part in parts if part) + ("" if self.count is None else f"#{self.count}")


def parse_id(text: str | os.PathLike) -> HubId | None:
    """Return the id that a text has the form of; None for other texts, as paths and addresses of object stores."""
    match = _ID.fullmatch(str(text))
    if match is None or _is_no_name(match["repo"]):
        return None
    return HubId(match["repo"], match["revision"], match["source"] or "hf")


def of_cache(folder: str | os.PathLike) -> HubId | None:
    """Return the id and commit of a folder in the cache of the Hub; None for other folders."""
    match = re.search(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$", Path(folder).as_posix())
    return HubId(f"{match[1]}/{match[2]}", match[3]) if match else None


def portable(path: str) -> str:
    """Return a file of the Hub's cache by repository, commit and name, as on every machine; others unchanged."""
    match = re.search(r"(models|datasets)--([^/]+)--([^/]+)/(?:snapshots|jvlm)/([0-9a-f]{40})/(.+)$", path)
    return path if match is None else f"hf://{match[1]}/{match[2]}/{match[3]}@{match[4]}/{match[5]}"


def parse_dataset(text: str) -> DatasetId | None:
    """Return the dataset that a text has the form of; None for other texts."""
    match = _DATASET.fullmatch(text)
    hub_id = match and parse_id(match["id"])
    # a file of the disk has a suffix that is read
    if hub_id is None or (match["source"] is None and hub_id.repo.endswith(_SUFFIXES)):
        return None
    count = None if match["count"] is None else int(match["count"])
    return DatasetId(hub_id, match["subset"], match["split"], count)


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a name is an id and not a folder or file: what exists on disk is never looked for on a hub."""
    hub_id = parse_id(name)
    return hub_id is not None and (str(name).startswith(f"{hub_id.source}://") or not Path(name).exists())


def is_dataset_id(pattern: str) -> bool:
    """Whether a pattern of data files is the id of a dataset: what is on disk is never looked for on a hub."""
    dataset_id = parse_dataset(pattern)
    return dataset_id is not None and (pattern.startswith(f"{dataset_id.id.source}://") or not Path(pattern).exists())


def require_id(name: str | os.PathLike, revision: str | None = None) -> HubId:
    """Return the id of a name that is no folder. Raises UserError, saying both, if it has not the form of one."""
    hub_id = parse_id(name)
    if hub_id is None:
        raise UserError(
            f"{name} is not a folder here, and not the id of a repository on the Hugging Face Hub (ORG/NAME, or "
            "ORG/NAME@REVISION); correct the path, or give an id"
        )
    if revision is None:
        return hub_id
    if hub_id.revision not in (None, revision):
        raise UserError(f"{name}: the revision is given twice, as {hub_id.revision} and {revision}; give it once")
    return hub_id.at(revision)


def _is_no_name(repo: str) -> bool:
    """Names that no hub takes: two dots or dashes in a row, or the ending of a git address."""
    return ".." in repo or "--" in repo or repo.endswith(".git")
