"""A sweep as one HTML page that needs nothing else: each metric as a table and as points with intervals."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from jvlm.scoring.statistics import Interval
from jvlm.sweep.results import RunResult, Setting, metrics_of, more_is_better, settings_of, verdict
from jvlm.sweep.runner import SweepConfig
from jvlm.sweep.trials import Trial


@dataclasses.dataclass(frozen=True)
class Bar:
    """A setting of one metric; positions are per cent of the plot's width, None where there is no interval."""

    name: str
    mean: float
    at: float
    low: float | None
    high: float | None
    interval: Interval | None
    runs: int
    verdict: str


@dataclasses.dataclass(frozen=True)
class Plot:
    """One metric: its settings, and the numbers at the ends of the axis."""

    metric: str
    more_is_better: bool
    bars: tuple[Bar, ...]
    lowest: float
    highest: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A trial: its values, the metrics in the page's order (None where it has none), its state, and its report."""

    trial: Trial
    values: tuple[float | None, ...]
    state: str
    report: str | None


def plot(metric: str, settings: Sequence[Setting]) -> Plot:
    """Return a metric's settings laid out on a common axis that holds all means and intervals."""
    ends = [end for s in settings for end in ((s.interval.low, s.interval.high) if s.interval else (s.mean,))]
    lowest, highest = min(ends), max(ends)
    span = (highest - lowest) or 1.0

    def at(value: float) -> float:
        return 100 * (value - lowest) / span

    bars = tuple(
        Bar(
            s.name,
            s.mean,
            at(s.mean),
            at(s.interval.low) if s.interval else None,
            at(s.interval.high) if s.interval else None,
            s.interval,
            s.runs,
            verdict(s, metric),
        )
        for s in settings
    )
    return Plot(metric, more_is_better(metric), bars, lowest, highest)


def write(
    path: Path,
    sweep: SweepConfig,
    config: str,
    trials: Sequence[Trial],
    found: Mapping[str, RunResult],
    states: Mapping[str, str],
) -> None:
    """Write the page.

    Args:
      found: slug -> result, of the trials that are finished.
      states: slug -> how a trial stands ("done", "failed", ...).
    """
    plots = [plot(metric, own) for metric in metrics_of(found) if (own := settings_of(found, trials, metric))]
    rows = [
        Row(
            trial,
            tuple(found[trial.slug].values.get(p.metric) if trial.slug in found else None for p in plots),
            states[trial.slug],
            _report(sweep, trial),
        )
        for trial in trials
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvlm.sweep", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        title=sweep.name, config=config, fields=" ".join(sweep.fields), plots=plots, rows=rows
    )
    path.write_text(page)


def _report(sweep: SweepConfig, trial: Trial) -> str | None:
    """Return where a trial's own page is, from the sweep's folder; None where it is not on this disk."""
    report = Path(os.fspath(sweep.run_folder(trial))) / "report.html"
    return os.path.relpath(report, sweep.folder) if report.is_file() else None
