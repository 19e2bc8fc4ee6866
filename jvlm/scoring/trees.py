"""How far two trees are apart, and tables as trees: TEDS (arXiv 1911.10683)."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jvlm.scoring.extras import require

_MOST = 1000  # nodes of a tree; a longer answer is none, as time grows with the square
_EMPTY = frozenset("br img hr col input meta link".split())


@dataclasses.dataclass(frozen=True)
class Tree:
    """A node with what hangs on it.

    Attributes:
      size: elements that it stands for, itself and those within its text.
    """

    label: Any
    children: tuple[Tree, ...] = ()
    size: int = 1


def nodes(tree: Tree) -> int:
    """Return how many elements a tree has."""
    return tree.size + sum(map(nodes, tree.children))


def distance(one: Tree, other: Tree, rename: Callable[[Any, Any], float]) -> float:
    """Return the least cost of making one ordered tree the other: 1 for a node put in or taken out.

    Zhang and Shasha, SIAM J. Computing 18 (1989).

    Args:
      rename: the cost of a node's label becoming another.
    """
    a, b = _postorder(one), _postorder(other)
    costs = np.array([[rename(x, y) for y, _ in b] for x, _ in a], np.float64).reshape(len(a), len(b))
    found = np.zeros((len(a), len(b)))
    for i in _keyroots(a):
        for j in _keyroots(b):
            _forests(a, b, i, j, costs, found)
    return float(found[-1, -1])


def _postorder(tree: Tree) -> list[tuple[Any, int]]:
    """(label, place of the leftmost leaf below) of each node, children first."""
    found: list[tuple[Any, int]] = []

    def visit(node: Tree) -> int:
        first = [visit(child) for child in node.children]
        found.append((node.label, first[0] if first else len(found)))
        return found[-1][1]

    visit(tree)
    return found


def _keyroots(nodes: Sequence[tuple[Any, int]]) -> list[int]:
    return sorted({left: place for place, (_, left) in enumerate(nodes)}.values())


def _forests(a, b, i: int, j: int, costs: np.ndarray, found: np.ndarray) -> None:
    left_a, left_b = a[i][1], b[j][1]
    rows, columns = i - left_a + 2, j - left_b + 2
    forest = np.zeros((rows, columns))
    forest[:, 0], forest[0, :] = np.arange(rows), np.arange(columns)
    for x in range(1, rows):
        for y in range(1, columns):
            m, n = left_a + x - 1, left_b + y - 1
            change = min(forest[x - 1, y], forest[x, y - 1]) + 1
            if a[m][1] == left_a and b[n][1] == left_b:
                forest[x, y] = min(change, forest[x - 1, y - 1] + costs[m, n])
                found[m, n] = forest[x, y]
            else:
                above, beside = a[m][1] - left_a, b[n][1] - left_b
                forest[x, y] = min(change, forest[above, beside] + found[m, n])


@dataclasses.dataclass(frozen=True)
class Cell:
    """A node of a table; of a cell the marks and letters in it."""

    tag: str
    columns: int = 0
    rows: int = 0
    content: tuple[str, ...] = ()


class _Table(html.parser.HTMLParser):
    """Reads the first table of a page."""

    def __init__(self):
        super().__init__()
        self.open: list[tuple[str, dict[str, str], list[Tree]]] = []
        self.cell: list[str] | None = None
        self.inside = 0  # elements in a cell
        self.table: Tree | None = None

    def handle_starttag(self, tag, attrs):
        if self.table is not None:
            return
        if self.cell is not None and tag not in ("td", "tr", "thead", "tbody"):
            self.cell.append(f"<{tag}>")
            self.inside += 1
            return
        if tag == "table" or self.open:
            self._close_before(tag)
            self.open.append((tag, {name: value or "" for name, value in attrs}, []))
            if tag == "td":
                self.cell, self.inside = [], 0
            if tag in _EMPTY:
                self._close()

    def handle_endtag(self, tag):
        if self.cell is not None and tag not in ("td", "tr", "thead", "tbody", "table"):
            self.cell.append(f"</{tag}>")
        elif any(one[0] == tag for one in self.open):
            while self._close() != tag:
                pass

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def _close_before(self, tag: str) -> None:
        """Close what HTML lets be left open: a cell before the next, a row before the next."""
        ends = {"td": ("td",), "tr": ("td", "tr"), "tbody": ("td", "tr", "thead", "tbody")}.get(tag, ())
        while self.open and self.open[-1][0] in ends:
            self._close()

    def _close(self) -> str:
        tag, attributes, children = self.open.pop()
        cell = Cell(tag)
        size = 1
        if tag == "td":
            spans = (attributes.get(name, "1") for name in ("colspan", "rowspan"))
            columns, rows = (int(span) if span.strip().isdigit() else 1 for span in spans)
            cell, size = Cell(tag, columns, rows, tuple(self.cell or ())), 1 + self.inside
            self.cell = None
        tree = Tree(cell, tuple(children), size)
        if self.open:
            self.open[-1][2].append(tree)
        else:
            self.table = tree
        return tag

    def close(self):
        super().close()
        while self.open:
            self._close()


def table(text: str) -> Tree | None:
    """Return the first table of an HTML text; None where there is none, or one too large."""
    parser = _Table()
    parser.feed(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    parser.close()
    return parser.table if parser.table is not None and nodes(parser.table) <= _MOST else None


def markdown_table(text: str) -> Tree:
    """Return a table of Markdown: its first line and those from the third on, cells between bars."""
    lines = re.sub(r"^```(?:markdown)?|```$", "", text.strip()).strip().split("\n")
    rows = [[cell.strip() or " " for cell in line.strip().split("|")[1:-1]] for line in [*lines[:1], *lines[2:]]]
    return rows_tree(rows[:_MOST])


def rows_tree(rows: Sequence[Sequence[str]]) -> Tree:
    """Return a table of rows of cells."""
    made = [Tree(Cell("tr"), tuple(Tree(Cell("td", 1, 1, tuple(cell))) for cell in row)) for row in rows]
    return Tree(Cell("table"), tuple(made))


def teds(one: Tree, other: Tree) -> float:
    """Return the similarity of two tables, from 0 to 1: edits of tags, spans and contents over the larger's nodes."""
    levenshtein = require("rapidfuzz.distance").Levenshtein

    def rename(a: Cell, b: Cell) -> float:
        if (a.tag, a.columns, a.rows) != (b.tag, b.columns, b.rows):
            return 1.0
        longest = max(len(a.content), len(b.content))
        return levenshtein.distance(a.content, b.content) / longest if longest else 0.0

    most = max(nodes(one), nodes(other)) - 1
    return max(1 - distance(one, other, rename) / most, 0.0) if most else 1.0
