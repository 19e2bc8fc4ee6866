"""Which data source an example belongs to, so that a run can show a curve for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Document
from jvlm.data.errors import ExampleError
from jvlm.data.example_source import matching
from jvlm.data.mixture.plan import enters

CHANNEL = "channel"
# Examples of a channel that the sample of the data before the run did not show, or of none.
OTHER = "other"
_MOST = 64  # sources with a curve


def sources_of(patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return name -> files of each data source: a file or a glob of the configuration, by its shortest name."""
    files = {pattern: tuple(matching(pattern)) for pattern in patterns}
    short = [Path(pattern).name for pattern in patterns]
    return {
        (name if short.count(name) == 1 else pattern): files[pattern]
        for name, pattern in zip(short, patterns, strict=True)
    }


def names(config: DataConfig, channels: Iterable[str]) -> tuple[str, ...]:
    """Return the sources to show curves of; none where there is only one. Of many, the last are shown as "other".

    Args:
      channels: of a sample of the examples.
    """
    if config.curves == "off" or config.preference != "none":  # what is learnt of pairs has no sums by token
        return ()
    if config.curves == "dataset":
        result = tuple(sources_of(config.train) if config.mixture is None else enters(config.mixture))
        if len(result) < 2:
            return ()
        return result if len(result) <= _MOST else (*result[: _MOST - 1], OTHER)
    result = tuple(sorted(set(channels) - {OTHER}))
    return (*result[: _MOST - 1], OTHER) if result else ()


def channel_of(conversation: Conversation | Document) -> str | None:
    """Return the ``channel`` of an example. Raises ExampleError for one that is no text."""
    value = dict(conversation.extra).get(CHANNEL)
    if value is not None and not (isinstance(value, str) and value):
        raise ExampleError(conversation.origin, CHANNEL, f"{value!r} is not a name", "Write a text, or leave it out")
    return value


class SourceNumbers:
    """The number of each example's source among the names of `DataConfig.sources`; -1 for none of them."""

    def __init__(self, config: DataConfig):
        self.by_channel = config.curves == "channel"
        self._numbers = {name: number for number, name in enumerate(config.sources)}
        self._paths = config.mixture is not None
        if not self.by_channel and not self._paths:
            files = sources_of(config.train) if config.sources and config.curves == "dataset" else {}
            known = self._numbers
            self._numbers = {path: known[name] for name, paths in files.items() if name in known for path in paths}

    def of(self, conversation: Conversation | Document) -> int:
        """Return the number of an example's source. Raises ExampleError for a channel that is no text."""
        if not self.by_channel and not self._paths:
            return self._numbers.get(conversation.origin.file, self._numbers.get(OTHER, -1))
        name = channel_of(conversation) if self.by_channel else conversation.origin.source
        return self._numbers.get(name, self._numbers.get(OTHER, -1))
