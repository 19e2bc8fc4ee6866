"""Datasets that TensorFlow Datasets prepared, without TensorFlow: ArrayRecord or Parquet beside ``features.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers.array_record import RecordFile
from jvlm.data.readers.parquet import Parquet
from jvlm.data.readers.reader import missing_package
from jvlm.errors import UserError

FEATURES = "features.json"
COLUMN = "data"  # of records as bytes, in Parquet


class Features:
    """How the records of a prepared dataset are decoded: images stay encoded, text is text.

    Raises:
      UserError: tensorflow-datasets is not installed; features that cannot be read, or nested steps (RLDS).
    """

    def __init__(self, path: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise missing_package(path, "a dataset of TFDS", "tensorflow-datasets", "tfds") from error
        folder = str(Path(path).parent)
        try:
            self._features = tfds.features.FeaturesDict.from_config(folder)
        except (ValueError, OSError, KeyError, AttributeError, ImportError) as error:
            raise UserError(f"{folder}/{FEATURES}: cannot be read ({error})") from error
        self._tfds = tfds
        nested = [name for name, feature in self._features.items() if isinstance(feature, tfds.features.Dataset)]
        if nested:
            raise UserError(f"{path}: {nested[0]} is a dataset in each example (RLDS), which is not read. Convert it")
        self._decoders = {
            name: tfds.decode.SkipDecoding()
            for name, feature in self._features.items()
            if isinstance(feature, tfds.features.Image)
        }

    def decode(self, record: bytes, origin: Origin) -> dict[str, Any]:
        """Return a record with Python's own values. Raises ExampleError if it is damaged."""
        try:
            values = self._features.deserialize_example_np(record, decoders=self._decoders)
        except Exception as error:  # whatever the protobuf parser and the decoders of features raise
            raise ExampleError(
                origin, "example", f"a damaged record ({str(error)[:200]})", "Copy the file again"
            ) from error
        return {name: self._plain(values[name], self._features[name]) for name in values}

    def _plain(self, value: Any, feature: Any) -> Any:
        features = self._tfds.features
        if isinstance(feature, features.FeaturesDict):
            return {name: self._plain(value[name], feature[name]) for name in value}
        if isinstance(feature, features.Sequence):
            inner = feature.feature
            if isinstance(inner, features.FeaturesDict):
                columns = {name: [self._plain(item, inner[name]) for item in value[name]] for name in value}
                return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            return [self._plain(item, inner) for item in value]
        if isinstance(feature, features.Image):
            return {"bytes": bytes(value), "path": None} if isinstance(value, bytes) else value
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace") if isinstance(feature, features.Text) else value
        if isinstance(value, np.generic):
            return value.item()
        return value.tolist() if isinstance(value, np.ndarray) else value


class _Prepared:
    """Beside a reader of records as bytes, what decodes them. It is made again where it is unpickled."""

    path: str
    _features: Features | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_features": None}

    def decoded(self, record: bytes, origin: Origin) -> Any:
        """Return a record, or the ExampleError of a damaged one."""
        if self._features is None:
            self._features = Features(self.path)
        try:
            return self._features.decode(record, origin)
        except ExampleError as error:
            return error


class TfdsRecords(_Prepared, RecordFile):
    """Examples of an ArrayRecord file of a prepared dataset."""

    def __init__(self, path: str):
        super().__init__(path)
        self._features = Features(path)

    def read(self, index: int, origin: Origin) -> Any:
        try:
            record = self.content(index, origin)
        except ExampleError as error:
            return error
        return self.decoded(record, origin)


class TfdsParquet(_Prepared, Parquet):
    """Examples of a Parquet file of a prepared dataset: each is the bytes of one column."""

    def __init__(self, path: str):
        super().__init__(path)
        self._features = Features(path)

    def read(self, index: int, origin: Origin) -> Any:
        row = super().read(index, origin)
        return row if isinstance(row, ExampleError) else self.decoded(row[COLUMN], origin)


def is_prepared(parquet: Parquet) -> bool:
    """Return whether a Parquet file is one of a prepared dataset, which has but one column."""
    return parquet.columns == [COLUMN] and (Path(parquet.path).parent / FEATURES).is_file()
