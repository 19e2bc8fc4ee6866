"""The state of one answer, from admission to its end."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import numpy as np

from jvlm.inference.drafts import NGramDrafts
from jvlm.inference.scheduling import prefix
from jvlm.inference.scheduling.config import SchedulerConfig
from jvlm.inference.scheduling.plans import Row
from jvlm.inference.scheduling.sequence_spec import Media, SequenceSpec

# "forking": another answer of the same request computes the prompt.
State = Literal["waiting", "prefilling", "forking", "decoding", "ended"]


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and the tokens of one answer to it.

    Attributes:
      number: unique, never used again.
      arrival: order of its request among all.
      limit: most answer tokens.
      tokens: prompt and answer, as far as the host has read it.
      keys: of its whole pages, as far as needed.
      feature_keys: of the features of its pictures.
      after_prompt: rotary position of the first answer token.
      computed: tokens whose keys and values are in its pages, once all plans that were given out are done.
      target: tokens that a prefill must compute.
      pages: that it holds, in order.
      registered: how many of them were registered under their content.
      cached: tokens that were found in the cache at its last admission.
      in_flight: tokens that plans draw for it, and that are not known.
      held: keys of the pictures whose features it holds.
      epoch: of the weights that it began with.
    """

    spec: SequenceSpec
    number: int
    index: int
    arrival: int
    limit: int
    tokens: list[int]
    keys: list[bytes]
    feature_keys: tuple[bytes, ...]
    after_prompt: int
    drafts: NGramDrafts | None
    epoch: int = 0
    state: State = "waiting"
    computed: int = 0
    target: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    registered: int = 0
    cached: int = 0
    slot: int = -1
    generation: int = 0
    in_flight: int = 0
    preemptions: int = 0
    held: tuple[bytes, ...] = ()

    @classmethod
    def all_of(
        cls, spec: SequenceSpec, first: int, arrival: int, limit: int, config: SchedulerConfig
    ) -> list[Sequence]:
        """Return the answers of a request, numbered from ``first``."""
        keys = prefix.prompt_keys(spec, config.page_size) if config.prefix_cache else []
        tokens, after_prompt = spec.tokens.tolist(), int(spec.positions.max(initial=-1)) + 1
        feature_keys = tuple(_feature_key(spec, media) for media in spec.media)
        return [
            cls(
                spec=spec,
                number=first + index,
                index=index,
                arrival=arrival,
                limit=limit,
                tokens=list(tokens),
                keys=list(keys),
                feature_keys=feature_keys,
                after_prompt=after_prompt,
                drafts=NGramDrafts(spec.draft_tokens) if spec.draft_tokens else None,
            )
            for index in range(spec.n)
        ]

    @property
    def prompt_length(self) -> int:
        """Return the number of tokens of the prompt."""
        return len(self.spec.tokens)

    @property
    def answered(self) -> int:
        """Return the number of answer tokens that the host has read."""
        return len(self.tokens) - self.prompt_length

    @property
    def planned(self) -> int:
        """Return the number of answer tokens read or being drawn."""
        return self.answered + self.in_flight

    @property
    def needs_last_token(self) -> bool:
        """Return whether the next step must wait for the token of the last one."""
        return self.spec.needs_last_token or (self.drafts is not None and self.drafts.active(len(self.tokens)))

    def row(self, draw: int) -> Row:
        """Return the sequence as a row of a plan that draws answer tokens from the ``draw``-th on, counted from 0."""
        return Row(self.number, self.spec.request_id, self.index, self.slot, self.generation, draw)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the rotary positions of some tokens, int32 [stop - start, 3].

        Those of the prompt are slices of the whole prompt's; answer tokens follow its largest one, on all axes.
        """
        prompt = self.spec.positions[start:stop]
        begin = max(start, self.prompt_length)
        if begin >= stop:
            return prompt
        after = self.after_prompt + np.arange(begin, stop) - self.prompt_length
        return np.concatenate([prompt, np.repeat(after[:, None], 3, 1)]).astype(np.int32)

    def next_position(self) -> int:
        """Return the rotary position of the token that is computed next, behind the prompt."""
        return self.after_prompt + self.computed - self.prompt_length

    def extend_keys(self, pages: int, page_size: int) -> None:
        """Add the keys of pages that hold answer tokens, until there are ``pages`` keys."""
        while len(self.keys) < pages:
            start = len(self.keys) * page_size
            span = slice(start, start + page_size)
            index = np.full(page_size, -1, np.int32)
            prompt = self.spec.vision_index[span]
            index[: len(prompt)] = prompt
            parent = self.keys[-1] if self.keys else prefix.root_key(self.spec)
            tokens = np.array(self.tokens[span], np.int32)
            positions = self.positions(start, start + page_size)
            self.keys.append(prefix.page_key(parent, tokens, positions, index, self.spec.media))

    def media_from(self, start: int) -> list[int]:
        """Return the numbers of the pictures that feed a token of the prompt from an index on."""
        index = self.spec.vision_index[start:]
        index, media = index[index >= 0], self.spec.media
        return [i for i, m in enumerate(media) if ((index >= m.first) & (index < m.first + m.tokens)).any()]


@dataclasses.dataclass(eq=False)
class Waiting:
    """Sequences that are admitted together: all answers of a new request, or one that was preempted.

    Attributes:
      deadline: number of admissions after which it goes before all others.
      waits: False once it was admitted or aborted.
    """

    sequences: list[Sequence]
    deadline: int
    waits: bool = True

    @property
    def first(self) -> Sequence:
        """Return the sequence that prefills."""
        return self.sequences[0]


def _feature_key(spec: SequenceSpec, media: Media) -> bytes:
    """Return the key of a picture's features: its content, the vision tower's adapter and the salt."""
    adapter = spec.encoder_adapter
    return hashlib.sha256(media.content + len(adapter).to_bytes(8, "little") + adapter + spec.salt.encode()).digest()
