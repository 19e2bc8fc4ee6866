"""Folders of datasets: the data files of a subset and split, as the folder's own description lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvlm.data.readers.tar import ENERGON_FOLDER, read_yaml
from jvlm.data.readers.tfds import FEATURES
from jvlm.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".arrayrecord")
_PARTS = re.compile(r"(?P<folder>.+?)(?::(?P<subset>[^:/]+))?(?::(?P<split>[^:/]+))?")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 1_000_000
# what jvlm's own commands write beside shards about them: what they found, and counts
FOUND, REPORT = "found.jsonl", "report.json"


def split_name(pattern: str) -> tuple[Path, str | None, str | None] | None:
    """Return (folder, subset, split) of DIR, DIR:SUBSET or DIR:SUBSET:SPLIT; None where there is no such folder."""
    if Path(pattern).is_dir():
        return Path(pattern), None, None
    match = _PARTS.fullmatch(pattern)
    if match is None or not Path(match["folder"]).is_dir():
        return None
    return Path(match["folder"]), match["subset"], match["split"]


def files_of(folder: Path, subset: str | None = None, split: str | None = None) -> list[str]:
    """Return the data files of a dataset's folder, in order.

    What `datasets` saved, Energon and TFDS prepared, a folder of images with metadata, shards that `jvlm data dedup`
    and the like wrote, or a snapshot of a dataset's repository. The split of a folder without subsets may be given as
    the subset.

    Raises:
      UserError: no data files, or no such subset or split, listing what there is; a file that is missing.
    """
    only = split or subset  # where there are no subsets
    if (folder / "dataset_dict.json").is_file():
        splits = [str(name) for name in _read_json(folder / "dataset_dict.json").get("splits", [])]
        return files_of(folder / _chosen(folder, only or "train", splits))
    if (folder / "state.json").is_file():
        return _of_saved(folder)
    if (folder / ENERGON_FOLDER).is_dir():
        return _of_energon(folder, only or "train")
    if (folder / FEATURES).is_file():
        return _of_tfds(folder, only or "train")
    if (folder / "dataset_info.json").is_file() and any(folder.glob("*.arrow")):
        return _by_split(folder, only or "train", sorted(folder.glob("*.arrow")))
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if metadata:
        return [str(metadata[0])]
    shards = sorted(map(str, folder.glob("*.arrayrecord")))
    if shards and (folder / FOUND).is_file() and (folder / REPORT).is_file():
        return shards
    return _of_snapshot(folder, subset, split)


def _of_saved(folder: Path) -> list[str]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{folder}: saved with a table of indices. Save it again after flatten_indices()")
    return _present(folder, [str(entry.get("filename")) for entry in state.get("_data_files", [])])


def _of_energon(folder: Path, split: str) -> list[str]:
    parts = read_yaml(folder / ENERGON_FOLDER / "split.yaml").get("split_parts")
    parts = parts if isinstance(parts, dict) else {}
    names = parts[_chosen(folder, split, [str(name) for name in parts])]
    return _present(folder, [file for name in names for file in _expanded(str(name))])


def _expanded(name: str) -> list[str]:
    """``shard_{000..002}.tar`` is three names."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    first, last = int(match[1]), int(match[2])
    if last - first >= _MOST_FILES:
        raise UserError(f"{name}: {last - first + 1:,} files, above {_MOST_FILES:,}")
    width = len(match[1])
    numbers = [f"{name[: match.start()]}{n:0{width}d}{name[match.end() :]}" for n in range(first, last + 1)]
    return [found for number in numbers for found in _expanded(number)]


def _of_tfds(folder: Path, split: str) -> list[str]:
    pattern = re.compile(r".+-(?P<split>[^-.]+)\.(array_record|parquet|tfrecord)-(?P<number>\d+)-of-(?P<count>\d+)")
    found: dict[str, list[re.Match]] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(match["split"], []).append(match)
    matches = found[_chosen(folder, split, list(found))]
    lacking = set(range(int(matches[0]["count"]))) - {int(match["number"]) for match in matches}
    if lacking:
        raise UserError(f"{folder}: {len(lacking)} of the {matches[0]['count']} files of split {split} are missing")
    return [str(folder / match[0]) for match in matches]


def _by_split(folder: Path, split: str, files: Sequence[Path]) -> list[str]:
    """Files of `datasets`' cache: NAME-SPLIT.arrow, NAME-SPLIT-00000-of-00002.arrow."""
    found: dict[str, list[str]] = {}
    for file in files:
        if not file.name.startswith("cache-"):  # what map() and filter() left
            name = re.sub(r"-\d+-of-\d+$", "", file.stem)
            found.setdefault(name.rpartition("-")[2], []).append(str(file))
    return found[_chosen(folder, split, list(found))]


def _of_snapshot(folder: Path, subset: str | None, split: str | None) -> list[str]:
    from jvlm.hub import datasets  # which opens files by `registry`
    from jvlm.hub.downloads import RepoFile
    from jvlm.hub.ids import DatasetId, HubId

    listed = [
        RepoFile(path.relative_to(folder).as_posix(), path.stat().st_size, "")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    if not any(file.path.endswith(_SUFFIXES) for file in listed):
        raise UserError(f"{folder}: a folder without data files ({', '.join('*' + suffix for suffix in _SUFFIXES)})")
    card = folder / datasets.CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    wanted = DatasetId(HubId(str(folder)), subset, split)
    return [str(folder / file.path) for file in datasets.choose(wanted, listed, text)]


def _chosen(folder: Path, split: str, splits: Sequence[str]) -> str:
    if split not in splits:
        raise UserError(
            f"{folder} has no split {split!r}; it has {', '.join(splits) or 'none'} (write {folder}:"
            f"{splits[0] if splits else 'SPLIT'})"
        )
    return split


def _present(folder: Path, names: Sequence[str]) -> list[str]:
    """Files inside a folder, by the names in its own description."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder}: its description names {name!r}, outside the folder. Correct it")
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: missing, though the folder's description names it. Copy the whole folder"
            )
    if not names:
        raise UserError(f"{folder}: its description names no data files")
    return [str(folder / name) for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    return values if isinstance(values, dict) else {}
