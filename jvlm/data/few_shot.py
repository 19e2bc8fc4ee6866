"""Few-shot examples: other examples of the same data as demonstrations before each one, in one conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jvlm.data.content import Conversation, Image, Message, ObjectBox, Part, Video
from jvlm.data.errors import MEMORY, ExampleError, Origin
from jvlm.data.example_source import Read
from jvlm.data.examples import parse_conversation
from jvlm.data.few_shot_config import FewShot
from jvlm.data.sources import channel_of

_TRIES = 64  # examples looked at for each demonstration of the same channel


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Origin, Any]: ...

    def formats(self) -> list[str]: ...


class FewShotSource:
    """A source each of whose examples has demonstrations before it.

    Which ones follows from the seed and the example's index alone: they do not depend on the order of training, on how
    many processes read it, or on where a run began again. Of a demonstration that cannot be read, the example is bad.

    Args:
      source: the examples, of which the demonstrations are taken as well.
      seed: of the run.
    """

    def __init__(self, source: Source, config: FewShot, seed: int):
        self.source, self.config, self.seed = source, config, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Origin, Conversation | ExampleError]:
        """(origin of the example, conversation with its demonstrations or what is wrong with it)."""
        origin, record = self.source[index]
        try:
            asked = _parsed(origin, record)
            return origin, joined([*self._demonstrations(index, asked), asked], self.config)
        except ExampleError as error:
            return origin, error

    def read(self, index: int) -> Read:
        """Return an example with its demonstrations, as `ExampleSource.read` does."""
        return Read(*self[index])

    def formats(self) -> list[str]:
        """Return what the source says about the formats of its files."""
        return self.source.formats()

    def __repr__(self) -> str:  # Grain's checkpoints compare it
        return f"FewShotSource({self.source}, {self.config}, {self.seed})"

    def _demonstrations(self, index: int, asked: Conversation) -> list[Conversation]:
        rng = np.random.default_rng([self.seed, index])
        low, high = self.config.shots
        wanted = min(int(rng.integers(low, high + 1)), len(self) - 1)
        channel = channel_of(asked)
        taken, found = {index}, []
        for _ in range(_TRIES * wanted):
            if len(found) == wanted:
                return found
            other = int(rng.integers(len(self)))
            if other in taken:
                continue
            taken.add(other)
            shot = _parsed(*self.source[other])
            if self.config.same == "source" or channel_of(shot) == channel:
                found.append(shot)
        if len(found) < min(low, len(self) - 1):
            raise ExampleError(
                asked.origin,
                "channel",
                f"{len(found)} other examples of channel {channel!r} among {len(taken) - 1} drawn, {low} are wanted",
                "Give the channel files and a source of its own, or set few_shot.same to source",
            )
        return found


def _parsed(origin: Origin, record: Any) -> Conversation:
    if isinstance(record, ExampleError):
        raise record
    return parse_conversation(record, origin)


def joined(examples: Sequence[Conversation], config: FewShot) -> Conversation:
    """Return conversations as one, which is about the last.

    The system turn is that of the last example. Images, videos and boxes keep their turns; settings of images, tools
    and fields carried along are those of the last.

    Raises:
      ExampleError: demonstrations with tools, or with image settings that differ from those of the last.
    """
    *shots, asked = examples
    messages: list[Message] = [m for m in asked.messages[:1] if m.role == "system"]
    images = videos = 0
    for number, example in enumerate(examples):
        folder = str(Path(example.origin.file).parent) if example.origin.file != MEMORY else None
        is_shot = number < len(shots)
        if is_shot and (example.tools != asked.tools or example.image_settings != asked.image_settings):
            raise ExampleError(
                asked.origin,
                "chat_template_kwargs" if example.tools == asked.tools else "tools",
                f"differs from that of {example.origin}, which is to be a demonstration before it",
                "Give examples that share them a source of their own",
            )

        def moved(part: Part, images: int = images, videos: int = videos, folder: str | None = folder) -> Part:
            if isinstance(part, Image | Video):
                offset = images if isinstance(part, Image) else videos
                return dataclasses.replace(part, index=part.index + offset, folder=part.folder or folder)
            return dataclasses.replace(part, image=part.image + images) if isinstance(part, ObjectBox) else part

        for message in example.messages:
            if message.role == "system":
                continue
            message = message.map(moved)
            if is_shot and config.loss == "last":
                message = dataclasses.replace(message, loss_weight=0.0, loss_given=True)
            messages.append(message)
        images += 1 + max((part.index for part in example.images), default=-1)
        videos += 1 + max((part.index for part in example.videos), default=-1)
    return dataclasses.replace(asked, messages=tuple(messages))
