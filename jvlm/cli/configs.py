"""``jvlm configs``: the experiments that come with jvlm."""

from __future__ import annotations

import dataclasses

from jvlm.cli.experiment import listing
from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class Configs:
    """List the experiments that come with jvlm: `jvlm train NAME` runs one, `jvlm train NAME --help` has its fields."""


def run(words: list[str]) -> int:
    parse(Configs, words, "jvlm configs")
    print(listing())
    return 0
