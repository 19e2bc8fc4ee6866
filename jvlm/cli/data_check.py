"""``jvlm data check``: what training would do with data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tyro.conf import Positional

from jvlm import configs
from jvlm.data.config import DataConfig
from jvlm.errors import UserError
from jvlm.options import parse_with

if TYPE_CHECKING:
    from jvlm.data.check_report import CheckReport
    from jvlm.data.errors import Rejected
    from jvlm.data.prepare.held_out import HeldOut
    from jvlm.data.processor import Processor

PROGRAM = "jvlm data check"


class DataFiles(Protocol):
    """Options that name data; see `DataCheck`."""

    files: tuple[str, ...]
    model: str | None
    config: str | None
    media_root: str | None


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Count examples that can and cannot be used, and say why. Settings of the data are options too, as in training.

    Attributes:
      files: JSONL or ArrayRecord files, or globs; without any, the data of --config and of its stages.
      model: folder whose tokenizer and image limits to count tokens with.
      config: check as this experiment would train: a Python file, or the name of a shipped config. All of its fields
        are options then.
      media_root: folder for relative image paths, after the data file's own.
      verbose: print every example that cannot be used.
      output: JSONL file to write every example to that cannot be used.
      lengths: also measure how long each example is, from the headers of its images, and keep that in
        data.lengths_folder, where a mixture whose weights are shares of tokens or patches finds it.
    """

    files: Positional[tuple[str, ...]] = ()
    model: str | None = None
    config: str | None = None
    media_root: str | None = None
    verbose: bool = False
    output: str | None = None
    lengths: bool = False


@dataclasses.dataclass(frozen=True)
class DataFields:
    """Settings of the data.

    Attributes:
      data: as in an experiment.
    """

    data: DataConfig = DataConfig()


def run(words: list[str]) -> int:
    config = config_of_words(words)
    base = DataFields() if config is None else configs.load(config)
    options, fields = parse_with(DataCheck(), base, words, PROGRAM)
    from jvlm.data.rejections import writing

    runs = _data_to_check(options, fields)
    checks = [check for _, checks in runs for check in checks]
    if options.lengths and not all(one.processor for one in checks):
        raise UserError("--lengths counts tokens: give --model, or a --config")
    files = [pattern for one in checks for pattern in one.data.files]
    held_out, status = held_out_of(fields), 0
    with writing(options.output, files, verbose=options.verbose) as on_rejected:
        for run, own in runs:
            reports = []
            for one in own:
                if len(checks) > 1:
                    print(f"{one.name}:")
                reports.append(_check(one, on_rejected, held_out))
                if options.lengths:
                    _measure(one.processor, one.data, one.source)
            status = 1 if any(report.usable < report.examples for report in reports) else status
            if run.data.mixture is not None and run.processor is not None:
                print(_table(run, [report.config for report in reports]), flush=True)
    return status


def _check(one: Checked, on_rejected: Callable[[Rejected], None] | None, held_out: HeldOut | None) -> CheckReport:
    """Check data and print what was found."""
    from jvlm.data.check import check
    from jvlm.data.view.looked import Looked

    # demonstrations repeat examples on purpose
    looked = None if one.processor is None or one.data.few_shot is not None else Looked(one.data)
    report = check(
        one.data.train,
        one.processor,
        one.data,
        seed=one.seed,
        on_rejected=on_rejected,
        on_checked=None if looked is None else looked.add,
        digests=looked is not None,
        held_out=held_out,
    )
    lines = [] if looked is None else list(looked.lines())
    print("\n".join([report.text(), *lines]), flush=True)
    return report


def _table(run: Checked, checked: Sequence[DataConfig]) -> str:
    """Return what a run will draw of each source of its mixture."""
    from jvlm.data.mixture.examples import Draws, Examples
    from jvlm.data.mixture.table import table
    from jvlm.data.view.drawn import planned

    config = planned(run.processor, run.data, checked)
    length = ""
    if run.data.run_examples is None and config.run_examples is not None:
        length = f" of one pass, {config.run_examples:,} examples (data.run_examples sets it)"
    return (
        f"{run.name}, as a run{length} draws it:\n{table(Draws(Examples.open(config), config, seed=run.seed), config)}"
    )


def _measure(processor: Processor, data: DataConfig, name: str) -> None:
    """Measure all examples of a source, and say in which file that is kept."""
    from jvlm.data import lengths
    from jvlm.data.example_source import ExampleSource

    found = lengths.of_source(processor, data, name, ExampleSource.of(data), sample=None)
    good, path = int((found.status == lengths.GOOD).sum()), lengths.path_of(processor, data, name)
    print(f"{path}: lengths of {found.examples:,} examples, of which {good:,} can be used", flush=True)


def config_of_words(words: Sequence[str]) -> str | None:
    """Return the value of --config, which decides what the other options are."""
    for word, value in zip(words, [*words, None][1:], strict=True):
        if word == "--config":
            return value
        match = re.fullmatch("--config=(.*)", word)
        if match:
            return match[1]
    return None


class Checked(NamedTuple):
    """Data to check: that of files, or of a source of a stage, whose path in its mixture is ``source``."""

    name: str
    data: DataConfig
    processor: Processor | None
    seed: int
    source: str


def _data_to_check(options: DataCheck, fields) -> list[tuple[Checked, list[Checked]]]:
    """Return the files' data, or that of each stage of an experiment, and the same source by source."""
    runs = []
    for name, data, *rest in data_of_runs(options, fields):
        checks = [
            Checked(f"{name}, {source}" if source else name, one, *rest, source or "train")
            for source, one in _sources_of(data)
        ]
        runs.append((Checked(name, data, *rest, ""), checks))
    if not all(check.data.train for _, checks in runs for check in checks):
        raise UserError("no data to check: give files, or a --config that names them as data.train")
    return runs


def data_of_runs(options: DataFiles, fields) -> list[tuple[str, DataConfig, Processor | None, int]]:
    """Return (name, data, processor, seed) of the files' data, or of each stage of an experiment."""
    from jvlm.training import processors

    given = {"train": options.files, "mixture": None} if options.files else {}
    given |= {"media_root": options.media_root} if options.media_root else {}
    processor = None if options.model is None else processors.load(options.model)
    if options.config is None:
        runs = [("data", fields.data, 0)]
    else:
        from jvlm.training.runs import runs_of  # and with it all of training

        runs = [(run.name, run.data, run.seed) for run in ([fields] if options.files else runs_of(fields))]
        processor = processor or processors.of_experiment(fields)
    return [(name, dataclasses.replace(data, **given), processor, seed) for name, data, seed in runs]


def held_out_of(fields: Any) -> HeldOut | None:
    """Return the evaluation and validation data of an experiment, for what its training data shares with them."""
    if isinstance(fields, DataFields):
        return None
    from jvlm.training.resolve import held_out

    return held_out(fields)


def _sources_of(data: DataConfig) -> list[tuple[str, DataConfig]]:
    """Return (path, data) of each source of a mixture, read alone; without a mixture the path is empty."""
    from jvlm.data.mixture.examples import config_of
    from jvlm.data.mixture.plan import enters

    if data.mixture is None:
        return [("", data)]
    return [(path, config_of(data, source)) for path, source in enters(data.mixture).items()]
