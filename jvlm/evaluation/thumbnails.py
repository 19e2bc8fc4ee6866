"""Small pictures of the first questions of a task, for the report."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jvlm.data.content import Image
from jvlm.data.errors import ExampleError
from jvlm.data.images import open_image
from jvlm.evaluation.task import Item

MOST = 96  # so that the few questions with an odd outcome, which the report shows, have theirs
_SIDE = 360


def path_of(folder: Path, name: str) -> Path:
    """Return where the picture of a question is, if there is one."""
    return folder / "media" / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.jpg"


class Thumbnails:
    """Writes pictures of the first questions; one that cannot be read is left out, as its question will say."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0

    def add(self, item: Item) -> None:
        """Write the first picture of a question."""
        images = [part for part in item.content if isinstance(part, Image)]
        if self._count >= MOST or not images:
            return
        self._count += 1
        path = path_of(self._folder, item.id)
        if path.exists():
            return
        try:
            image = open_image(images[0].source, roots=(images[0].folder,) if images[0].folder else ())
        except ExampleError:
            return
        image.thumbnail((_SIDE, _SIDE))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "JPEG", quality=85)
