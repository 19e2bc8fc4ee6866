"""What the page says of usable examples beside their counts, as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from jvlm.data.check import Checked
from jvlm.data.config import DataConfig
from jvlm.data.example_source import ExampleSource
from jvlm.data.view.equal_images import EqualImages
from jvlm.data.view.remarks import Remarks
from jvlm.data.view.sample import title_of

_IMAGES = 3  # shown


class Looked:
    """Takes the examples of a check, which has to ask for digests.

    Args:
      config: of the check.
    """

    def __init__(self, config: DataConfig):
        self._source = ExampleSource.of(config)
        distinct = self._source.distinct()
        self._distinct = None if len(distinct) == len(self._source) else frozenset(distinct)
        self._remarks, self._equal = Remarks(), EqualImages()

    def add(self, index: int, checked: Checked) -> None:
        """Take an example."""
        if checked.rejected is not None or (self._distinct is not None and index not in self._distinct):
            return
        if checked.contents is not None:
            self._remarks.add(index, checked.contents)
        self._equal.add("", index, checked.digests)

    def lines(self) -> Iterator[str]:
        """Yield what is worth a look, and how many images several examples have."""
        for remark in self._remarks.found():
            groups = [" and ".join(map(self._title, group)) for group in remark.examples]
            yield f"worth a look: {remark.text}" + (f" ({'; '.join(groups)})" if groups else "")
        images = self._equal.images()
        if images:
            first = ["; ".join(self._title(one.index) for one in image.first) for image in images[:_IMAGES]]
            count = "1 image is" if len(images) == 1 else f"{len(images):,} images are"
            yield f"{count} in several examples, as in {'; and in '.join(first)}"

    def _title(self, index: int) -> str:
        return title_of(self._source.read(index).origin)
