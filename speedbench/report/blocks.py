"""Blocks: what a report is made of; console, markdown and HTML each draw them in their own way."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Style = Literal["plain", "error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Heading:
    """The title of the report (level 1) or of a section (level 2)."""

    text: str
    level: Literal[1, 2] = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    style: Style = "plain"


@dataclass(frozen=True, slots=True)
class Facts:
    """A list of (label, text, style)."""

    items: tuple[tuple[str, str, Style], ...]


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Lines as the published console prints them."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A header (its line breaks are hints), and whether its cells are words, which may wrap."""

    header: str
    words: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the last row is a total if `total`; `notes` are footnotes."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    total: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, in which unit ('' for a pure number); `ticks` names its places 0, 1, ...
    where it is no scale."""

    label: str
    unit: str = ""
    log: bool = False
    ticks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Series:
    """Values (n,) over places (n,), with 95 % intervals where given; `names` tells points apart.

    A value that is not known is NaN and is not drawn.
    """

    label: str
    mark: Literal["bar", "point", "line", "step"]
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, and the table of its numbers, which stands for it where nothing can be drawn.

    id         unique on the page: an HTML id
    alt        what a reader who cannot see it is told: one sentence with the main numbers
    table      every number that is drawn
    spans      shaded parts of the x axis: (from, to, what)
    reference  a horizontal line (vertical if `horizontal`) at this value, such as a speedup of 1
    horizontal places go down, values go right (categories with long names)
    """

    id: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    table: Table
    spans: tuple[tuple[float, float, str], ...] = ()
    reference: float | None = None
    horizontal: bool = False


Block = Heading | Paragraph | Facts | Verbatim | Table | Chart

_ESCAPE_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
)


def clean(text: str) -> str:
    """Text that no terminal takes for a command: one line, without control or format characters."""
    text = re.sub(r"\s+", " ", _ESCAPE_SEQUENCE.sub("", text))
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs")).strip()
