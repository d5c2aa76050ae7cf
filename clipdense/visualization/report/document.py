"""Parts of a report, and their HTML: one file without a link to any other."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined

__all__ = ["Block", "Cell", "Figure", "Gallery", "Preformatted", "Section", "Table", "data_uri", "render"]

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table; a click on a heading sorts it.

    Attributes:
        headers: headings of the columns.
        rows: texts are left-aligned; floats have ``digits`` decimals; None and NaN are a dash.
        caption: what the numbers are.
        digits: number of decimals.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    digits: int = 1
    kind: str = field(default="table", init=False)

    def text(self, cell: Cell) -> str:
        """Return the text of a cell."""
        if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
            return "\u2013"
        if not isinstance(cell, float):
            return str(cell)
        text = f"{cell:.{self.digits}f}"
        return text.removeprefix("-") if float(text) == 0 else text

    def key(self, cell: Cell) -> str:
        """Return what a cell is sorted by; empty cells come last."""
        return "" if self.text(cell) == "\u2013" else str(cell)


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        source: data URI.
        caption: what it shows.
    """

    source: str
    caption: str = ""
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures with a line of text each.

    Attributes:
        headers: titles of the columns.
        rows: text, and data URIs of the pictures.
        caption: what it shows.
    """

    headers: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    caption: str = ""
    kind: str = field(default="gallery", init=False)


@dataclass(frozen=True)
class Preformatted:
    """A text in a fixed-width font, folded at first.

    Attributes:
        title: line that unfolds it.
        text: the text.
    """

    title: str
    text: str
    kind: str = field(default="text", init=False)


Block = Table | Figure | Gallery | Preformatted


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        title: heading.
        blocks: content.
        text: a sentence before the content, such as what is missing.
        group: what a row of sections is about, such as a dataset; "" for the whole run.
    """

    title: str
    blocks: Sequence[Block] = ()
    text: str = ""
    group: str = ""


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes of a MIME type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def render(title: str, sections: Sequence[Section]) -> str:
    """Return a report as HTML.

    Args:
        title: heading of the page.
        sections: content; sections with neither text nor blocks are left out.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = Path(__file__).parent
    template = environment.from_string((folder / "report.html").read_text("utf-8"))
    return template.render(
        title=title,
        sections=[section for section in sections if section.text or section.blocks],
        style=(folder / "style.css").read_text("utf-8"),
        script=(folder / "script.js").read_text("utf-8"),
    )
