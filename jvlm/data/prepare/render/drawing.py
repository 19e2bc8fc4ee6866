"""Scenes drawn with Pillow: lines of text, code and tables, with the box of each part; formulas by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.prepare.regions import Region, Scene
from jvlm.data.prepare.render.fonts import Fonts, font, required

_MOST_CELLS, _MOST_LINES = 48, 60


def text_scene(text: str, fonts: Fonts, rng: np.random.Generator, origin: Origin) -> Scene:
    """Return a paragraph on a page, broken into lines; font, size, width and colours are drawn."""
    file = fonts.draw_from(rng, text, origin)
    face = font(file, int(rng.integers(14, 41)))
    width, margin = int(rng.integers(320, 1025)), int(rng.integers(8, 49))
    lines = _wrapped(text.split(), width - 2 * margin, face)[:_MOST_LINES]
    image, ink = _paper(rng, (width, 2 * margin + _height(face) * len(lines)))
    draw, regions = ImageDraw.Draw(image), []
    for number, line in enumerate(lines):
        place = (margin, margin + number * _height(face))
        draw.text(place, line, fill=ink, font=face)
        regions.append(Region(line, draw.textbbox(place, line, font=face), "line"))
    return _scene(image, "\n".join(lines), regions)


def columns_scene(paragraphs: Sequence[str], fonts: Fonts, rng: np.random.Generator, origin: Origin) -> Scene:
    """Return a page of two or three columns of consecutive paragraphs, from one of them on; read column by column."""
    columns, rows = int(rng.integers(2, 4)), int(rng.integers(12, 41))
    first = int(rng.integers(len(paragraphs)))
    shown = [*paragraphs[first:], *paragraphs[:first]]
    face = font(fonts.draw_from(rng, "".join(shown), origin), int(rng.integers(12, 21)))
    width, gap, margin = int(rng.integers(200, 361)), int(rng.integers(16, 41)), int(rng.integers(16, 49))
    lines: list[str] = []
    for paragraph in shown:
        lines += [*_wrapped(_broken(paragraph.split(), width, face), width, face), ""]
    lines = lines[: columns * rows]
    height = _height(face)
    size = (2 * margin + columns * width + (columns - 1) * gap, 2 * margin + rows * height)
    image, ink = _paper(rng, size)
    draw, regions, ruled = ImageDraw.Draw(image), [], bool(rng.integers(2))
    for number, line in enumerate(lines):
        column, row = divmod(number, rows)
        place = (margin + column * (width + gap), margin + row * height)
        if line:
            draw.text(place, line, fill=ink, font=face)
            regions.append(Region(line, draw.textbbox(place, line, font=face), "line"))
    for column in range(1, columns) if ruled else ():
        x = margin + column * (width + gap) - gap // 2
        draw.line((x, margin, x, size[1] - margin), fill=ink)
    return _scene(image, "\n".join(lines).strip(), regions)


def code_scene(code: str, name: str, fonts: Fonts, rng: np.random.Generator, origin: Origin) -> Scene:
    """Return consecutive lines of a file of code, coloured by pygments as one of its styles does.

    Args:
      name: of the file, which says the language.
    """
    lexers, styles = required("pygments.lexers"), required("pygments.styles")
    lines = code.expandtabs(4).splitlines()
    count = min(len(lines), int(rng.integers(5, 31)))
    start = int(rng.integers(len(lines) - count + 1))
    shown = "\n".join(line.rstrip() for line in lines[start : start + count])
    face = font(fonts.draw_from(rng, shown, origin, monospaced=True), int(rng.integers(13, 25)))
    try:
        lexer = lexers.get_lexer_for_filename(name, stripnl=False)
    except required("pygments.util").ClassNotFound:
        lexer = lexers.get_lexer_by_name("text", stripnl=False)
    style = styles.get_style_by_name(("default", "monokai", "vs", "native")[int(rng.integers(4))])
    advance, margin = face.getlength("0"), 16
    width = 2 * margin + round(advance * max((len(line) for line in shown.split("\n")), default=1))
    image = Image.new("RGB", (width, 2 * margin + _height(face) * count), style.background_color)
    draw, column, row = ImageDraw.Draw(image), 0, 0
    plain = (0, 0, 0) if sum(image.getpixel((0, 0))) > 382 else (240, 240, 240)
    for kind, value in lexer.get_tokens(shown):
        colour = style.style_for_token(kind)["color"]
        for part in value.splitlines(keepends=True):
            word = part.rstrip("\n")
            place = (margin + column * advance, margin + row * _height(face))
            draw.text(place, word, fill=f"#{colour}" if colour else plain, font=face)
            column, row = (0, row + 1) if part.endswith("\n") else (column + len(word), row)
    regions = []
    for number, line in enumerate(shown.split("\n")):
        if line.strip():
            indent = len(line) - len(line.lstrip())
            top = margin + number * _height(face)
            box = draw.textbbox((margin + indent * advance, top), line.strip(), font=face)
            regions.append(Region(line.strip(), box, "line"))
    return _scene(image, shown, regions)


def table_scene(rows: Sequence[Sequence[str]], fonts: Fonts, rng: np.random.Generator, origin: Origin) -> Scene:
    """Return the head and some rows of a table, with a box for each cell; its text is Markdown."""
    columns = min(len(rows[0]), 8)
    count = min(len(rows) - 1, max(1, int(rng.integers(2, _MOST_CELLS // columns + 2))))
    start = 1 + int(rng.integers(len(rows) - count))
    shown = [[" ".join(cell.split()) for cell in row[:columns]] for row in (rows[0], *rows[start : start + count])]
    face = font(fonts.draw_from(rng, "".join(c for row in shown for c in row), origin), int(rng.integers(13, 25)))
    pad = int(rng.integers(5, 14))
    widths = [round(max(face.getlength(row[c]) for row in shown)) + 2 * pad for c in range(columns)]
    height, margin = _height(face) + pad, 12
    image, ink = _paper(rng, (2 * margin + sum(widths), 2 * margin + height * len(shown)))
    draw, regions, ruled = ImageDraw.Draw(image), [], bool(rng.integers(2))
    for r, row in enumerate(shown):
        x, y = margin, margin + r * height
        for cell, width in zip(row, widths, strict=True):
            if ruled:
                draw.rectangle((x, y, x + width, y + height), outline=ink)
            elif r == 0:
                draw.line((x, y + height, x + width, y + height), fill=ink, width=2)
            draw.text((x + pad, y + pad // 2), cell, fill=ink, font=face)
            if cell:
                regions.append(Region(cell, draw.textbbox((x + pad, y + pad // 2), cell, font=face), "cell"))
            x += width
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in shown]
    marks = [escaped[0], ["---"] * columns, *escaped[1:]]
    return _scene(image, "\n".join(f"| {' | '.join(row)} |" for row in marks), regions)


def formula_scene(formula: str, rng: np.random.Generator, origin: Origin) -> Scene:
    """Return a formula of LaTeX as matplotlib's mathtext draws it.

    Raises:
      ExampleError: what mathtext cannot draw.
    """
    mathtext, family = required("matplotlib.mathtext"), required("matplotlib.font_manager")
    plain = formula.strip().strip("$")
    fontset = ("cm", "stix", "dejavusans", "dejavuserif")[int(rng.integers(4))]
    properties = family.FontProperties(size=float(rng.integers(10, 19)), math_fontfamily=fontset)
    try:
        parsed = mathtext.MathTextParser("agg").parse(f"${plain}$", dpi=144, prop=properties)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise ExampleError(
            origin, "formula", f"mathtext cannot draw it ({reason})", "Leave it out: --on_bad_example skip"
        ) from error
    mask = np.asarray(parsed.image, np.float64) / 255
    margin = int(rng.integers(6, 25))
    height, width = mask.shape
    image, ink = _paper(rng, (width + 2 * margin, height + 2 * margin))
    paper = np.asarray(image, np.float64)
    paper = paper.copy()
    inside = paper[margin : margin + height, margin : margin + width]
    paper[margin : margin + height, margin : margin + width] = inside + (np.asarray(ink) - inside) * mask[..., None]
    ys, xs = np.nonzero(mask > 0.1)
    if not len(ys):
        raise ExampleError(origin, "formula", "nothing to be seen of it", "Leave it out: --on_bad_example skip")
    box = (margin + xs.min(), margin + ys.min(), margin + xs.max() + 1, margin + ys.max() + 1)
    region = Region(plain, tuple(map(float, box)), "formula")
    return _scene(Image.fromarray(np.rint(paper).astype(np.uint8)), plain, [region])


def _wrapped(words: Sequence[str], width: float, face) -> list[str]:
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _broken(words: Sequence[str], width: float, face) -> list[str]:
    """Words of which none is wider than a column."""
    parts: list[str] = []
    for word in words:
        parts.append("")
        for character in word:
            if parts[-1] and face.getlength(parts[-1] + character) > width:
                parts.append("")
            parts[-1] += character
    return parts


def _height(face) -> int:
    return round(1.35 * face.size)


def _paper(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int, int]]:
    """Paper with a little texture, light or dark, and an ink that can be read on it."""
    dark = rng.random() < 0.2
    base = rng.integers(10, 60, 3) if dark else rng.integers(215, 256, 3)
    grain = rng.normal(0, rng.uniform(0, 5), (size[1], size[0], 1))
    pixels = np.clip(np.rint(base + grain), 0, 255).astype(np.uint8)
    ink = rng.integers(200, 256, 3) if dark else rng.integers(0, 90, 3)
    return Image.fromarray(pixels), tuple(map(int, ink))


def _scene(image: Image.Image, text: str, regions: Sequence[Region]) -> Scene:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Scene(file.getvalue(), image.size, text, tuple(regions))
