"""``jvlm data shard``: examples and their images in a few large files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class DataShard:
    """Write examples and their images as ArrayRecord shards, which training reads faster and from object stores.

    Attributes:
      files: JSONL files, or globs of them.
      output: folder to write; it must not hold shards.
      examples_per_shard: examples in a file.
      media_root: folder for relative image paths, after the data file's own.
    """

    files: Positional[tuple[str, ...]]
    output: Path
    examples_per_shard: int = 10_000
    media_root: str | None = None


def run(words: list[str]) -> int:
    options = parse(DataShard, words, "jvlm data shard")
    if not options.files:
        raise UserError("jvlm data shard: no files; give JSONL files, or globs of them")

    from jvlm.data.check import shard

    print(shard(options.files, options.output, options.examples_per_shard, media_root=options.media_root))
    return 0
