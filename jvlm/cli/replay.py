"""``jvlm replay``: why a step was not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class Replay:
    """Find the tower and the conversation of a stopped run that are not finite.

    Attributes:
      folder: OUTPUT/nonfinite/FIRST-LAST, as the run named it when it stopped.
    """

    folder: Positional[Path]


def run(words: list[str]) -> int:
    options = parse(Replay, words, "jvlm replay")

    from jvlm.training.replay import replay

    for line in replay(options.folder):
        print(line, flush=True)
    return 0
