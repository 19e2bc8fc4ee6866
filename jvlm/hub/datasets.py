"""Files of a dataset's repository: which of them make a subset and split, and a form of them that is read here."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError
from jvlm.hub import downloads, modelscope
from jvlm.hub.downloads import RepoFile
from jvlm.hub.ids import DatasetId, HubId, parse_dataset

if TYPE_CHECKING:
    from jvlm.data.readers.parquet import Parquet

CARD = "README.md"
_READ = (".jsonl", ".json", ".arrayrecord", ".parquet", ".arrow", ".csv", ".tsv", ".tar")
_NOT_READ = {".zip": "zip", ".gz": "gzip"}
_MEDIA = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


def fetch(dataset: str | DatasetId) -> list[Path]:
    """Return the data files of a subset and split on this machine, downloaded if they are not.

    Images beside JSON lines are downloaded too. Parquet files are written again as ArrayRecord shards, once, beside
    the cache's other files: examples are read one by one in any order.

    Args:
      dataset: "ORG/NAME", "ORG/NAME@REVISION:SUBSET:SPLIT"; a number behind "#" is for the reader.

    Raises:
      UserError: no such dataset, subset or split, listing what there is; files of a kind that is not read, naming it.
      HubUnavailable: as `jvlm.hub.download`.
    """
    wanted = parse_dataset(dataset) if isinstance(dataset, str) else dataset
    if wanted is None:
        raise UserError(f"{dataset} is not the id of a dataset: write ORG/NAME or ORG/NAME:SUBSET:SPLIT")
    if wanted.id.source == "modelscope":
        folder = modelscope.download(wanted.id, "dataset", ("*",))
        listed = [
            RepoFile(p.relative_to(folder).as_posix(), p.stat().st_size, "") for p in folder.rglob("*") if p.is_file()
        ]
        card = folder / CARD
        return [folder / file.path for file in choose(wanted, listed, card.read_text() if card.is_file() else "")]
    pinned = downloads.resolve(wanted.id, "dataset")
    listed = downloads.files_of(pinned, "dataset")
    if listed is None:
        raise UserError(f"{pinned} was never downloaded here, and there is no network: unset HF_HUB_OFFLINE")
    cards = [file for file in listed if file.path == CARD]
    text = (downloads.fetch(pinned, "dataset", cards) / CARD).read_text(encoding="utf-8") if cards else ""
    files = choose(wanted, listed, text)
    media = [file for file in listed if file.path.lower().endswith(_MEDIA)]
    beside = media if any(file.path.endswith((".jsonl", ".json", ".csv", ".tsv")) for file in files) else []
    folder = downloads.fetch(pinned, "dataset", [*cards, *files, *beside])
    downloads.remember(wanted.id, "dataset", pinned)
    return [
        _shard(pinned, folder / file.path) if file.path.endswith(".parquet") else folder / file.path for file in files
    ]


def choose(wanted: DatasetId, listed: Sequence[RepoFile], card: str) -> list[RepoFile]:
    """Return the data files of a subset and split: as the card's YAML says, else by the names of folders and files."""
    configs = _configs(card)
    split = wanted.split or "train"
    by_name = {file.path: file for file in listed}
    if configs:
        splits = _of_card(wanted, configs, sorted(by_name))
    else:
        splits = _of_names(wanted, [path for path in sorted(by_name) if _is_data(path)])
    if split not in splits:
        raise UserError(
            f"{wanted.id} has no split {split!r}"
            + (f" in subset {wanted.subset}" if wanted.subset else "")
            + f"; it has {', '.join(splits) or 'no data files'}"
        )
    files = [by_name[path] for path in splits[split]]
    for file in files:
        suffix = PurePosixPath(file.path).suffix.lower()
        if suffix not in _READ:
            kind = _NOT_READ.get(suffix, suffix or "a name without suffix")
            raise UserError(
                f"{wanted.id}: {file.path} ({kind}) is not read; read are {', '.join(_READ)}: convert it to JSON lines"
            )
    return files


def _configs(card: str) -> list[dict[str, Any]]:
    if not card.startswith("---"):
        return []
    try:
        values = yaml.safe_load(card.split("---", 2)[1])
    except yaml.YAMLError as error:
        raise UserError(f"the card of the dataset has YAML that cannot be read ({error})") from error
    configs = values.get("configs") if isinstance(values, dict) else None
    return [config for config in configs or [] if isinstance(config, dict) and config.get("data_files")]


def _of_card(wanted: DatasetId, configs: list[dict[str, Any]], paths: list[str]) -> dict[str, list[str]]:
    names = [str(config.get("config_name", "default")) for config in configs]
    default = next((n for n, c in zip(names, configs, strict=True) if c.get("default")), None)
    name = wanted.subset or default or ("default" if "default" in names else None)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        problem = "has several subsets; choose one" if name is None else f"has no subset {name!r}; it has"
        raise UserError(f"{wanted.id} {problem}: {', '.join(names)} (write {wanted.id.repo}:{names[0]})")
    config = configs[names.index(name)]
    given, base = config["data_files"], str(config.get("data_dir", "")).strip("/")
    entries = given if isinstance(given, list) else [given]
    entries = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in entries]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        for pattern in patterns:
            whole = "/".join(part for part in (base, str(pattern).removeprefix("./")) if part)
            matched = [p for p in paths if p == whole or _matches(p, whole)]
            if not matched:
                raise UserError(f"{wanted.id}: the card's {whole} of subset {name} matches no file of the repository")
            splits.setdefault(str(entry.get("split", "train")), []).extend(matched)
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}


def _matches(path: str, pattern: str) -> bool:
    """As a glob: * stays within a folder, ** does not."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(words.get(part, re.escape(part)) for part in parts), path) is not None


def _of_names(wanted: DatasetId, paths: list[str]) -> dict[str, list[str]]:
    """Return splits by the words in names of files and folders; a subset is a top folder, or one below data/."""
    folders = sorted({p.removeprefix("data/").partition("/")[0] for p in paths if "/" in p.removeprefix("data/")})
    if wanted.subset not in (None, "default"):
        inside = [p for p in paths if p.removeprefix("data/").startswith(f"{wanted.subset}/")]
        if not inside:
            raise UserError(
                f"{wanted.id} has no subset {wanted.subset!r}; it has {', '.join(folders) or 'none by that name'}"
            )
        paths = inside
    files: dict[str, list[str]] = {}
    for path in paths:
        words = set(re.split(r"[^a-z0-9]+", path.lower()))
        split = next((name for name, known in _SPLITS.items() if words & set(known)), "")
        files.setdefault(split, []).append(path)
    rest = files.pop("", [])
    if rest and not files:
        return {"train": rest}
    return files


def _is_data(path: str) -> bool:
    name = PurePosixPath(path)
    return (
        name.suffix.lower() in (*_READ, *_NOT_READ)
        and not fnmatch.fnmatch(name.name, "*info*.json")
        and not name.name.startswith((".", "config", "metadata.json"))
    )


def _shard(id: HubId, parquet: Path) -> Path:
    """Return the examples of a Parquet file as an ArrayRecord shard, written once."""
    # which read from here what they are given by id
    from jvlm.data.readers.array_record import SHARD_SUFFIX, write_shard
    from jvlm.data.readers.parquet import Parquet

    name = re.sub(r"[^\w.-]", "_", parquet.as_posix().partition(f"{id.revision}/")[2])
    target = downloads.notes(id, "dataset") / str(id.revision) / f"{Path(name).stem}{SHARD_SUFFIX}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing {parquet.name} as {target}")
        write_shard(target, _examples(Parquet(str(parquet))))
    return target


def _examples(file: Parquet) -> Iterator[dict[str, Any]]:
    for index in range(len(file)):
        example = file.read(index, Origin(file.path, file.number(index)))
        if isinstance(example, ExampleError):
            raise example
        yield example


def address(wanted: DatasetId) -> str:
    """Return a dataset at its commit, as a restart asks for it."""
    pinned = downloads.resolve(wanted.id, "dataset")
    return dataclasses.replace(wanted, id=pinned).address
