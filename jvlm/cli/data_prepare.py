"""Options that the commands of preparing data share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from jvlm.errors import UserError

if TYPE_CHECKING:
    from jvlm.data.conversion import Conversion
    from jvlm.data.engines.engine import Engine
    from jvlm.data.formats.example_format import FormatOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """Shards that are written, and what works on them.

    Attributes:
      output: folder to write; the same command goes on with an interrupted one.
      examples_per_shard: examples in a file.
      on_bad_example: stop at an example that cannot be used, or leave it out; what is left out is counted and listed.
      engine: what works: this process; or Ray Data, on this machine or on a cluster whose machines see the same files.
        Both write the same.
      workers: processes of Ray; as many as it has processors for without it.
      worker_cpus: processors of each.
      worker_gpus: GPUs of each, as for a perplexity.
      ray_address: of a Ray cluster; without it that of RAY_ADDRESS, or Ray on this machine alone.
    """

    output: str
    examples_per_shard: int = 10_000
    on_bad_example: Literal["error", "skip"] = "error"
    engine: Literal["process", "ray"] = "process"
    workers: int | None = None
    worker_cpus: float = 1.0
    worker_gpus: float = 0.0
    ray_address: str | None = None

    def engine_of(self) -> Engine:
        """Return what works. Raises UserError for Ray where it is not installed, or for its options without it."""
        from jvlm.data.engines.engine import InProcess
        from jvlm.data.engines.ray_data import RayData

        if self.engine == "ray":
            return RayData(self.workers, self.worker_cpus, self.worker_gpus, self.ray_address)
        if (self.workers, self.worker_cpus, self.worker_gpus, self.ray_address) != (None, 1.0, 0.0, None):
            raise UserError("--workers, --worker_cpus, --worker_gpus and --ray_address are for --engine ray: add it")
        return InProcess()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made(Shards):
    """Shards of examples that are made.

    Attributes:
      rejected: JSONL file to write everything to that is left out.
    """

    examples_per_shard: int = 1000
    rejected: str | None = None

    def write(self, source: Any, verb: str) -> Conversion:
        """Write the examples of a source that knows its ``identity()``, and return their counts."""
        from jvlm.data.conversion import write_shards
        from jvlm.data.rejections import writing

        with writing(self.rejected, ()) as on_rejected:
            return write_shards(
                source,
                self.output,
                self.examples_per_shard,
                identity=source.identity(),
                on_bad_example=self.on_bad_example,
                on_rejected=on_rejected,
                verb=verb,
                engine=self.engine_of(),
            )

    def settings(self, kind: Callable[..., Any]) -> Any:
        """Return the dataclass of how they are made, each of whose fields is an option."""
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Shards):
    """Examples that are read, and the folder for what is found and kept.

    Attributes:
      files: data files of any kind that is read, globs of them, folders of datasets, or datasets on the Hub.
      output: folder for found.jsonl, report.json and the shards. The same command goes on where it was interrupted.
      format: format of the examples; "auto" decides for each file or glob, on its first 100 examples.
      columns: FROM=TO gives a column another name, FROM=_ hides it.
      media_root: folder for relative image paths, after the data file's own.
      threads: that read and decode images, of each process.
    """

    files: Positional[tuple[str, ...]] = ()
    output: str
    format: str = "auto"
    columns: tuple[str, ...] = ()
    media_root: str | None = None
    threads: int = 4

    def __post_init__(self):
        if not self.files:
            raise UserError("no files; give data files, or globs of them")
        if self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")

    def options(self) -> FormatOptions:
        """Return the format of the examples."""
        from jvlm.data.formats.example_format import FormatOptions

        return FormatOptions(self.format, self.columns)

    def shared(self) -> dict:
        """Return the arguments that every step takes."""
        return {
            "options": self.options(),
            "media_root": self.media_root,
            "on_bad_example": self.on_bad_example,
            "examples_per_shard": self.examples_per_shard,
            "threads": self.threads,
            "engine": self.engine_of(),
        }
