"""What a run of policy optimisation writes down."""

from __future__ import annotations

import dataclasses

from jvlm.rl.alarms import AlarmConfig
from jvlm.validation import check_fields

_COUNTS = ("samples_interval_steps", "held_out_prompts", "start_interval_steps")


@dataclasses.dataclass(frozen=True)
class RolloutLogConfig:
    """What a run writes down of its rollouts.

    Attributes:
      store: keep every answer with its tokens, log-probabilities, reward and advantage in ``<run>/rollouts``, a
        compressed file for each step: rewards can be computed again, and steps replayed.
      samples_interval_steps: steps between two versions of ``<run>/samples.html``, the groups of a step with pictures,
        boxes, rewards and reasons; the first and the last step have one too.
      held_out_prompts: of ``validation.data``, spread over it, that are answered greedily and judged every
        ``validation.interval_steps``.
      start_interval_steps: steps between two measurements of "start/kl3", how far the policy is from the model before
        the first step: one more pass, and a second copy of what is trained. None measures nothing.
      alarms: what is looked at, and what ends the run.
    """

    store: bool = True
    samples_interval_steps: int = 25
    held_out_prompts: int = 256
    start_interval_steps: int | None = None
    alarms: AlarmConfig = AlarmConfig()

    def __post_init__(self):
        check_fields(self, "task.log.", dict.fromkeys(_COUNTS, "[1, inf)"))
