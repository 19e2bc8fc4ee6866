"""Web pages drawn by headless Chromium, with the boxes of the elements that can be seen, from its own layout."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.prepare.regions import Region, Scene
from jvlm.data.prepare.render.fonts import required
from jvlm.errors import UserError

VIEWPORTS = ((1280, 800), (1024, 768), (820, 1180), (390, 844))
SCALES = (1.0, 1.5, 2.0)
EXECUTABLES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_SECONDS = 20
# Elements with words of their own, or a label, whose centre is on the screen and not covered by another.
_ELEMENTS = """() => {
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent).join(" ");
    const label = element.getAttribute("aria-label") || element.getAttribute("alt") || element.placeholder || "";
    const words = (own.trim() ? element.innerText || "" : label).replace(/\\s+/g, " ").trim();
    if (!words || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const box = element.getBoundingClientRect();
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    if (box.width < 1 || box.height < 1 || box.x < 0 || box.y < 0 || box.right > innerWidth || box.bottom > innerHeight)
      continue;
    const hit = document.elementFromPoint(x, y);
    if (!hit || !(element.contains(hit) || hit.contains(element))) continue;
    const role = element.getAttribute("role") || element.tagName.toLowerCase();
    found.push([words, box.x, box.y, box.right, box.bottom, role]);
  }
  return [document.body.innerText, found];
}"""


class Browser:
    """Chromium for pages that are files; it reaches no network. Use it as a context manager.

    Args:
      executable: of Chromium; None looks for one on the path.

    Raises:
      UserError: playwright is not installed, or there is no Chromium.
    """

    def __init__(self, executable: str | None = None):
        self._library = required("playwright.sync_api")
        found = executable or next((path for name in EXECUTABLES if (path := shutil.which(name))), None)
        if found is None:
            raise UserError("pages need Chromium: install chromium-headless-shell, or give --browser FILE")
        self._running = self._library.sync_playwright().start()
        try:
            self._browser = self._running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except self._library.Error as error:
            self._running.stop()
            raise UserError(f"{found} does not start ({str(error).splitlines()[0]})") from error

    @property
    def version(self) -> str:
        """Return Chromium's version."""
        return self._browser.version

    def close(self) -> None:
        """Stop Chromium."""
        self._browser.close()
        self._running.stop()

    def scene(
        self, file: Path, rng: np.random.Generator, origin: Origin, *, viewport: tuple[int, int] | None = None
    ) -> Scene:
        """Return what is on the screen of a page; its size, scale and colour scheme are drawn.

        Args:
          viewport: width and height of the screen, at scale 1, in place of drawn ones.

        Raises:
          ExampleError: a page that does not load in time.
        """
        width, height = viewport or VIEWPORTS[int(rng.integers(len(VIEWPORTS)))]
        scale = 1.0 if viewport else SCALES[int(rng.integers(len(SCALES)))]
        context = self._browser.new_context(
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
            color_scheme=("light", "dark")[int(rng.integers(2))],
            reduced_motion="reduce",
            offline=True,
        )
        try:
            context.route("**/*", _local_only)
            page = context.new_page()
            page.goto(file.resolve().as_uri(), timeout=1000 * _SECONDS)
            image = page.screenshot(animations="disabled", timeout=1000 * _SECONDS)
            text, found = page.evaluate(_ELEMENTS)
        except self._library.Error as error:
            problem = f"Chromium cannot show it ({str(error).splitlines()[0][:200]})"
            raise ExampleError(origin, "page", problem, "Leave it out: --on_bad_example skip") from error
        finally:
            context.close()
        with Image.open(io.BytesIO(image)) as opened:
            size = opened.size
        regions = tuple(
            Region(words, (x1 * scale, y1 * scale, x2 * scale, y2 * scale), role)
            for words, x1, y1, x2, y2, role in found
        )
        return Scene(image, size, text, regions)


def _local_only(route: Any) -> None:
    if route.request.url.startswith(("file:", "data:")):
        route.continue_()
    else:
        route.abort()
