"""Pages of the cache: who holds them, which content they keep, and which is given up first."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Pages with reference counts. Those that nobody holds any more keep their content until they are needed.

    A page that holds a whole page of computed tokens is registered under the hash of all tokens up to its end
    (`jvlm.inference.scheduling.prefix`). A sequence that holds a registered page holds the pages before it too, which
    are registered as well; so a page is never given up before the ones that continue it. Page 0 is given to nobody.

    Args:
      num_pages: page 0 included.
      keeps: whether pages are registered at all.
    """

    def __init__(self, num_pages: int, keeps: bool = True):
        self.num_pages, self.keeps = num_pages, keeps
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # registered pages that nobody holds, oldest first

    @property
    def available(self) -> int:
        """Return how many pages can be taken."""
        return len(self._free) + len(self._unused)

    @property
    def free(self) -> int:
        """Return how many pages hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Return how many pages keep content that nobody uses."""
        return len(self._unused)

    @property
    def usage(self) -> float:
        """Return the share of pages that are held, 0..1."""
        return 1 - self.available / (self.num_pages - 1)

    def references(self, page: int) -> int:
        """Return how many sequences hold a page."""
        return self._references[page]

    def take(self, count: int) -> list[int] | None:
        """Return pages that one sequence holds; None if there are not so many, and then none is taken.

        Content is given up only for want of empty pages, the longest unused first.
        """
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._unused)))
            page = self._free.pop()
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            self._references[page] += 1
            self._unused.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Count one holder less of each page. The pages of a sequence are given in its order."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] < 0:
                raise ValueError(f"page {page} is released more often than it was taken")
            if self._references[page]:
                continue
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Return the registered pages of the longest prefix of keys. They are not held before `share`."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def match_length(self, keys: Sequence[bytes]) -> int:
        """Return the number of pages that `match` finds, in logarithmic time: no page is there without those before."""
        return bisect.bisect_left(keys, True, key=lambda key: key not in self._page_of)

    def register(self, page: int, key: bytes) -> int:
        """Return the page that keeps a content: the given one, unless another keeps it already.

        In the latter case the holder's reference moves from the given page to that one.
        """
        if not self.keeps:
            return page
        known = self._page_of.get(key)
        if known == page:
            return page
        if known is not None:
            self.share((known,))
            self.release((page,))
            return known
        self._page_of[key], self._key_of[page] = page, key
        return page

    def forget(self) -> None:
        """Give up all content, of pages that are held as well: the weights have changed."""
        for page in list(self._unused):
            self._forget(page)
        self._page_of.clear()
        self._key_of.clear()

    def _forget(self, page: int) -> None:
        """Make a page that nobody holds an empty one."""
        del self._unused[page], self._page_of[self._key_of.pop(page)]
        self._free.append(page)
