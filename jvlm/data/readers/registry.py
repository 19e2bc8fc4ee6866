"""Which reader a file is opened with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath

from jvlm.data.readers import file_kinds
from jvlm.data.readers.array_record import SHARD_SUFFIX, Shard
from jvlm.data.readers.arrow import Arrow
from jvlm.data.readers.csv import Csv
from jvlm.data.readers.folder import METADATA
from jvlm.data.readers.image_folder import ImageFolder
from jvlm.data.readers.json_array import JsonArray, is_array
from jvlm.data.readers.json_lines import JsonLines
from jvlm.data.readers.parquet import Parquet
from jvlm.data.readers.reader import Reader
from jvlm.data.readers.tar import Tar
from jvlm.data.readers.tf_record import TfRecords
from jvlm.data.readers.tfds import TfdsParquet, TfdsRecords, is_prepared
from jvlm.errors import UserError


def _json(path: str) -> Reader:
    file_kinds.check_text(path)
    return JsonArray(path) if is_array(path) else JsonLines(path)


def _parquet(path: str) -> Reader:
    found = Parquet(path)
    return TfdsParquet(path) if is_prepared(found) else found


READERS: dict[str, Callable[[str], Reader]] = {
    ".jsonl": JsonLines,
    ".json": _json,
    ".csv": Csv,
    ".tsv": Csv,
    ".parquet": _parquet,
    ".arrow": Arrow,
    ".tar": Tar,
    SHARD_SUFFIX: Shard,
    ".array_record": TfdsRecords,
    ".tfrecord": TfRecords,
}
# TensorFlow's tools number files behind the suffix
_NUMBERED = re.compile(r"-\d+-of-\d+$")


def open_file(path: str, *, to_convert: bool = False) -> Reader:
    """Return the reader of a file, by its name and contents.

    Args:
      to_convert: whether a kind may be read that only `jvlm data convert` takes.

    Raises:
      UserError: a kind that is not read, a damaged file, or one without records.
    """
    name = PurePath(path).name
    reader = READERS.get(PurePath(_NUMBERED.sub("", name)).suffix)
    if reader is None:
        file_kinds.check_file(path)
        raise UserError(f"{path}: examples are read from {', '.join('*' + suffix for suffix in READERS)}")
    opened = reader(path)
    if getattr(opened, "convert_only", False) and not to_convert:
        raise UserError(
            f"{path}: TFRecord has no random access. Convert it first: jvlm data convert {path} --output DIR"
        )
    if name in METADATA:
        opened = ImageFolder(opened)
    if not len(opened) and getattr(opened, "mark", None) is None:  # a shard of a set may be empty
        raise UserError(f"{path}: holds no examples. Write it again, or leave it out of the list")
    return opened
