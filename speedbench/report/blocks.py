"""Blocks: what a report is made of; console, markdown and HTML each draw them in their own way."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Style = Literal["plain", "error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Heading:
    """The title of the report (level 1), of a section (level 2) or of a part of one (level 3)."""

    text: str
    level: Literal[1, 2, 3] = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    style: Style = "plain"


@dataclass(frozen=True, slots=True)
class Facts:
    """A list of (label, text, style); `terms`: label -> what it is defined as, where its own words
    do not say."""

    items: tuple[tuple[str, str, Style], ...]
    terms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Lines as the published console prints them."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A header (its line breaks are hints), and whether its cells are words, which may wrap.

    term  id in `definitions.TERMS` of what the cells are, where the header's own words are no name
          of it
    """

    header: str
    words: bool = False
    term: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the last row is a total if `total`; `notes` are footnotes.

    caption   what the table holds, where the heading above it does not say
    terms     first cell of a row -> id of its definition, where its own words are no name of it
    repeated  its numbers stand in other tables of the report, too: text leaves it out
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    total: bool = False
    caption: str = ""
    terms: Mapping[str, str] = field(default_factory=dict)
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, in which unit ('' for a pure number).

    ticks      names its places 0, 1, ... where it is no scale
    low, high  its natural ends (0 and 1 of a share), shown even if no value comes near
    """

    label: str
    unit: str = ""
    log: bool = False
    ticks: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Values (n,) over places (n,), with 95 % intervals where given; `names` tells points apart.

    A value that is not known is NaN and is not drawn.

    bounds  what low and high are, where they are no 95 % intervals
    """

    label: str
    mark: Literal["bar", "point", "line", "step"]
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    bounds: str = "95 %"


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, and the table of its numbers, which stands for it where nothing can be drawn.

    id         unique on the page: an HTML id
    alt        what a reader who cannot see it is told: one sentence with the main numbers
    table      every number that is drawn
    spans      shaded parts of the x axis: (from, to, what)
    reference  a horizontal line (vertical if `horizontal`) at this value, such as a speedup of 1
    horizontal places go down, values go right (categories with long names)
    repeated   its numbers stand in a table or line of the report, too: text leaves them out here
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
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part that a page folds away until it is asked for; text puts it last.

    in_place  text leaves it where it stands
    long      a terminal leaves it out, and says so
    """

    title: str
    blocks: tuple[Block, ...]
    in_place: bool = False
    long: bool = False


Block = Heading | Paragraph | Facts | Verbatim | Table | Chart | Section

LONGEST_IN_TEXT = 30
"""Rows of the longest figure's table that text shows."""


def as_text(blocks: Iterable[Block], *, brief: bool = False) -> Iterator[Block]:
    """The same report without figures and folded parts, for what can draw and fold nothing.

    A figure becomes its table if that is short, else the sentence that tells its main numbers;
    nothing if its numbers stand in another place. Folded parts come last, under a heading. If
    `brief`, long ones are only named.
    """
    folded: list[Section] = []
    left_out: list[str] = []
    shown: list[Table] = []
    for block in blocks:
        match block:
            case Section(long=True) if brief:
                left_out.append(block.title)
            case Section(in_place=True):
                yield from _unfolded(block)
            case Section():
                folded.append(block)
            case Chart():
                if not block.repeated and block.table not in shown:
                    yield from _in_words(block)
            case Table(repeated=False):
                shown.append(block)
                yield block
            case Table():
                pass
            case _:
                yield block
    for section in folded:
        yield from _unfolded(section)
    if left_out:
        yield Heading("Not shown here")
        yield Paragraph(f"{'; '.join(left_out)}. {WHERE_LONG}")


WHERE_LONG = "They are in --format html and markdown; of one arm, report its runs alone."


def _unfolded(section: Section) -> Iterator[Block]:
    yield Heading(section.title)
    yield from as_text(section.blocks)


def _in_words(chart: Chart) -> Iterator[Block]:
    if len(chart.table.rows) <= LONGEST_IN_TEXT:
        yield replace(chart.table, caption=chart.table.caption or chart.title)
    else:
        yield Paragraph(f"{chart.title}: {chart.alt}")


_ESCAPE_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
)


def clean(text: str) -> str:
    """Text that no terminal takes for a command: one line, without control or format characters."""
    text = re.sub(r"\s+", " ", _ESCAPE_SEQUENCE.sub("", text))
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs")).strip()
