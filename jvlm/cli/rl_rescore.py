"""``jvlm rl-rescore``: the rewards of a run's answers, computed again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jvlm.options import parse


@dataclasses.dataclass(frozen=True)
class RlRescore:
    """Judge the stored answers of a run again, and compare with the rewards of then. No model is needed.

    Ends with status 1 if a reward is another than the stored one: with the run's own rewards none should be; with
    others it says what they would have given.

    Attributes:
      run: folder of a run of jvlm rl.
      rewards: JSON file that names the reward of each task; None takes the verifiable reward of the task's name.
      steps: to judge; none takes all that are stored.
    """

    run: Positional[Path]
    rewards: Path | None = None
    steps: tuple[int, ...] = ()


def run(words: list[str]) -> int:
    given = parse(RlRescore, words, "jvlm rl-rescore")

    from jvlm.rl.rescore import rescore
    from jvlm.rl.rewards import config
    from jvlm.rl.rollout_files import ROLLOUTS

    with config.read(given.rewards) if given.rewards else config.rules() as router:
        found = rescore(given.run / ROLLOUTS, router, given.steps or None)
    for task, result in sorted(found.items()):
        print(result.line(task))
        for line in result.differences:
            print(f"  {line}")
    return 1 if any(result.different for result in found.values()) else 0
