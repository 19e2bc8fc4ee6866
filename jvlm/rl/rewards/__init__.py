"""Rewards of answers, for reinforcement learning.

A reward is a `jvlm.scoring.score.Score`, the type that evaluation counts too: a value from 0 to 1, or None where it is
not the model's fault that there is none; a reason; and what was read from the answer.

- `source`: an answer to be judged, and what can judge it.
- `rules`, `judge`, `models`, `plugins`: verifiable rewards, a judging model behind a server, reward models, functions
  written for other libraries.
- `router`: chooses by the name of the task; `config` reads that choice from a file.
- `client`, `server`, `blobs`: rewards from another process or machine.

They import no accelerator library; only a reward model does, when it is loaded.
"""
