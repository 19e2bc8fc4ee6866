"""How far a long job is: a bar on a terminal; elsewhere, as in a log that is redirected, a line every half minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30


class Progress(tqdm):
    """A tqdm bar that writes whole lines, and no carriage returns, where standard error is no terminal."""

    def __init__(self, *arguments: Any, **options: Any):
        self.plain = not sys.stderr.isatty()
        slow = {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS} if self.plain else {}
        super().__init__(*arguments, dynamic_ncols=not self.plain, **slow, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.plain:
            return super().display(msg, pos)
        self.fp.write(f"{self if msg is None else msg}\n")
        return True

    def clear(self, *arguments: Any, **options: Any) -> None:
        if not self.plain:
            super().clear(*arguments, **options)

    def close(self) -> None:
        if not self.plain:
            super().close()
        elif not self.disable:
            self.disable = True
            self._decr_instances(self)
