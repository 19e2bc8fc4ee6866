"""Print what training changed in several runs of one experiment, which differ by their seed.

    python -m tools.gains_over_seeds runs/easy_vqa_rl_42 runs/easy_vqa_rl_43

Ends with status 3 where a run missed an aim.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.evaluation.aim import EXIT_STATUS
from jvlm.evaluation.gains import Gain
from jvlm.scoring.statistics import Interval
from jvlm.training.log import clock


def changes_of(scores: dict[str, Any]) -> list[Gain]:
    """Return the changes of a scores.json."""
    intervals = ("before", "after", "change")
    return [Gain(**{**one, **{name: Interval(**one[name]) for name in intervals}}) for one in scores["changes"]]


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return a line for each run and score, from the scores.json of each run."""
    lines = [f"{'run':<20} {'score':<22} {'before':<22} {'after':<22} {'change':<26} training"]
    changes: dict[str, list[Gain]] = {}
    for name, scores in runs.items():
        for gain in changes_of(scores):
            before, after = gain.shown(gain.before), gain.shown(gain.after)
            change = gain.shown(gain.change, sign=True)
            time = clock(scores["training_seconds"])
            lines.append(f"{name:<20} {gain.name:<22} {before:<22} {after:<22} {change:<26} {time}")
            changes.setdefault(gain.name, []).append(gain)
        lines += [f"{name:<20} MISSED: {missed}" for missed in scores["missed_aims"]]
    for name, own in changes.items():
        values = [gain.unit * gain.change.value for gain in own]
        lines.append(
            f"{len(own)} runs, change of {name}: mean {np.mean(values):+.3f}, {min(values):+.3f} to {max(values):+.3f}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = {run.name: json.loads((run / "scores.json").read_text()) for run in parser.parse_args(words).runs}
    print(table(runs))
    return EXIT_STATUS if any(scores["missed_aims"] for scores in runs.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
