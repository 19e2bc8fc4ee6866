"""Scores of answers: what evaluation counts and what reinforcement learning rewards.

Each function takes the text of an answer and what is right, and returns a `Score`. They are deterministic, import no
accelerator library, evaluate no text as code and raise nothing because of what a model wrote.

- `answers`: which part of a text is the answer.
- `choice`, `words`, `counts`, `regions`, `spans`, `actions`, `maths`: strict forms for one right answer, made so that
  guessing several does not pay.
- `benchmarks`: the metrics of published tasks, as their authors compute them.
"""

from jvlm.scoring.score import Score

__all__ = ["Score"]
