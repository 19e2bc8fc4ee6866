"""TFRecord files of ``tf.train.Example``, for conversion: their lengths have to be read through for an index."""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.reader import missing_package
from jvlm.data.readers.tfds import FEATURES, Features
from jvlm.errors import UserError

_LENGTH = struct.Struct("<Q")
_BEFORE, _AFTER = 12, 4  # the length and its checksum; the checksum of the record. They are not checked
# what files of images begin with: JPEG, PNG, GIF, WebP, BMP, TIFF
_IMAGE_MARKS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


class TfRecords:
    """Examples of a TFRecord file, decoded as its ``features.json`` says, or else by what their bytes are.

    Attributes:
      convert_only: training does not read these files.

    Raises:
      UserError: a file cut short, or of another kind; tensorflow-datasets is not installed.
    """

    convert_only = True

    def __init__(self, path: str):
        file_kinds.check_file(path)
        self.path = path
        offsets, at, size = array("q"), 0, os.path.getsize(path)
        with open(path, "rb") as file:
            while at < size:
                file.seek(at)
                head = file.read(_BEFORE)
                length = _LENGTH.unpack(head[:8])[0] if len(head) == _BEFORE else size
                if at + _BEFORE + length + _AFTER > size:
                    raise UserError(
                        f"{path}: no TFRecord file, or cut short: its record at byte {at:,} does not end. Copy it again"
                    )
                offsets.extend((at + _BEFORE, length))
                at += _BEFORE + length + _AFTER
        self._offsets = np.asarray(offsets).reshape(-1, 2)
        self._features = Features(path) if (Path(path).parent / FEATURES).is_file() else None

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a TFRecord file is read by one process, which converts it")

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        """Return the number of a record, from 1."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        start, size = self._offsets[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            record = file.read(size)
        try:
            return self._features.decode(record, origin) if self._features else _by_bytes(record, origin)
        except ExampleError as error:
            return error


def _by_bytes(record: bytes, origin: Origin) -> dict[str, Any]:
    try:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_generated_pb2
    except ImportError as error:
        raise missing_package(origin.file, "TFRecord", "tensorflow-datasets", "tfds") from error
    example = tf_example_generated_pb2.Example()
    try:
        example.ParseFromString(record)
    except DecodeError as error:
        raise ExampleError(origin, "example", "not a tf.train.Example", "Write it again") from error
    found = {}
    for name, feature in sorted(example.features.feature.items()):
        kind = feature.WhichOneof("kind")
        values = [_plain(value) for value in getattr(feature, kind).value] if kind else []
        if values:
            found[name] = values[0] if len(values) == 1 else values
    return found


def _plain(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    if value.startswith(_IMAGE_MARKS):
        return {"bytes": value, "path": None}
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
