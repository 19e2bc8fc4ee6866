"""Writing the page: one HTML file that asks the network for nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2

from jvlm.data.view import histogram
from jvlm.data.view.run_view import RunView
from jvlm.errors import UserError, file_errors

LARGEST = 20_000_000  # bytes of a page
_BEGINNING = b"<!doctype html>"


def check_target(target: Path) -> None:
    """Raise UserError for a target that is a folder, or a file that is no HTML page."""
    if target.is_dir():
        raise UserError(f"--output {target}: a folder. Give it the name of a file")
    if not target.exists():
        return
    with file_errors(target, "read"), open(target, "rb") as file:
        beginning = file.read(len(_BEGINNING))
    if beginning != _BEGINNING:
        raise UserError(f"--output {target} holds something else than a page. Give another name, or remove it")


def render(runs: Sequence[RunView], *, largest: int = LARGEST) -> bytes:
    """Return the page, with fewer samples of each source where it would be larger than ``largest`` bytes.

    Raises:
      UserError: it is larger without any samples.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvlm.data.view", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("view.html.jinja")
    most = max((len(some) for run in runs for some in run.samples.values()), default=0)
    shown = most
    while True:
        left = [run.with_samples(shown) for run in runs]
        page = template.render(
            runs=left,
            width=histogram.WIDTH,
            height=histogram.HEIGHT,
            colours=histogram.COLOURS,
            cut=None if shown == most else (shown, most),
        )
        encoded = page.encode("utf-8", "backslashreplace")  # a cut emoji leaves half a surrogate pair
        if len(encoded) <= largest:
            return encoded
        if not shown:
            raise UserError(
                f"the page has {len(encoded):,} bytes without any samples, more than {largest:,}. View fewer sources"
            )
        shown //= 2


def write(target: Path, page: bytes) -> None:
    """Write the page; it appears under its name once it is whole. Raises UserError where it cannot be written."""
    with file_errors(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            part.write_bytes(page)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
