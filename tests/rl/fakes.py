"""An engine and rewards without a model, which take any time."""

from __future__ import annotations

import random
import time

import numpy as np

from jvlm.inference.requests import Event, TokenLogprob
from jvlm.scoring.score import Score


class Killed(BaseException):
    """The process ends here."""


class FakeEngine:
    """Draws tokens as the real one does: by seed, number of the answer and of the token. ``chance`` decides the order
    in which answers come forward."""

    def __init__(self, chance: random.Random | None = None, dies_after: int | None = None):
        self.chance, self.left = chance, dies_after
        self.answers: dict[tuple[str, int], list] = {}
        self.drawn = 0

    def submit(self, request):
        for index in range(request.sampling.n):
            draw = np.random.default_rng([request.sampling.seed, request.sampling.number + index])
            tokens = draw.integers(0, 50, int(draw.integers(1, 7))).tolist()
            self.answers[request.id, index] = [tokens, 0]

    def step(self):
        events = []
        keys = list(self.answers)
        if self.chance is not None:
            time.sleep(self.chance.random() * 1e-3)
            keys = [key for key in keys if self.chance.random() < 0.6]
        for key in keys:
            tokens, done = self.answers[key]
            self.drawn += 1
            if self.left is not None and self.drawn > self.left:
                raise Killed
            ends = done + 1 == len(tokens)
            logprob = TokenLogprob(tokens[done], -float(tokens[done]) / 7, entropy=0.5)
            events.append(Event(*key, tokens[done], f"{tokens[done]} ", logprob, "stop" if ends else None))
            self.answers[key][1] += 1
            if ends:
                del self.answers[key]
        return events

    def abort(self, request_id):
        self.answers = {key: value for key, value in self.answers.items() if key[0] != request_id}

    @property
    def has_work(self):
        return bool(self.answers)


class SlowJudge:
    """Rewards that depend on the answer alone, and take any time."""

    def __init__(self, chance: random.Random | None = None):
        self.chance = chance

    def scores(self, items):
        if self.chance is not None:
            time.sleep(self.chance.random() * 3e-3)
        return [Score(0.0 if item.token_ids[0] % 3 else 1.0, "ok", list(item.token_ids)) for item in items]
