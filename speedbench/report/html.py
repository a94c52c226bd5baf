"""HTML: a report as one page that loads nothing, follows light and dark, and can be printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, ClassVar

from speedbench import __version__
from speedbench.report import figures
from speedbench.report.blocks import (
    Block,
    Chart,
    Facts,
    Heading,
    Paragraph,
    Section,
    Table,
    Verbatim,
    clean,
)
from speedbench.report.definitions import Term, in_order, term_of

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

TEMPLATES = "speedbench.report.templates"
DEEPEST = 6
"""HTML has no heading below h6."""


def render(blocks: Iterable[Block], title: str) -> str:
    """The page. `title` is what a browser's tab shows, and the heading if no block is one."""
    page = _Page()
    parts = page.parts(blocks)
    return _template().render(
        title=clean(title),
        heading1=page.title or clean(title),
        css=_markup(page_css()),
        contents=page.contents + ([Entry("definitions", "Definitions")] if page.terms else []),
        parts=parts,
        terms=in_order(page.terms),
        version=__version__,
    )


def page_css() -> str:
    """The page's style sheet, with the colours of the figures' series."""
    light, dark = (
        "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))
        for colours in (figures.LIGHT, figures.DARK)
    )
    own = files(TEMPLATES).joinpath("report.css").read_text(encoding="utf-8").strip()
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"@media print{{:root{{{light}}}}}\n{own}\n{figures.CSS}"
    )


def _template() -> Template:
    import jinja2

    source = files(TEMPLATES).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)


def _markup(text: str) -> Markup:
    """Text that is markup already: ours, with everything from the data escaped in it."""
    from markupsafe import Markup

    return Markup(text)


# ---------------------------------------------------------------- what the template is given


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table of contents."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class HeadingView:
    kind: ClassVar[str] = "heading"
    id: str
    text: str
    level: int
    term: Term | None


@dataclass(frozen=True, slots=True)
class ParagraphView:
    kind: ClassVar[str] = "paragraph"
    text: str
    style: str


@dataclass(frozen=True, slots=True)
class VerbatimView:
    kind: ClassVar[str] = "verbatim"
    text: str


@dataclass(frozen=True, slots=True)
class FactView:
    label: str
    text: str
    style: str
    term: Term | None


@dataclass(frozen=True, slots=True)
class FactsView:
    kind: ClassVar[str] = "facts"
    facts: tuple[FactView, ...]


@dataclass(frozen=True, slots=True)
class HeadView:
    text: str
    numeric: bool
    term: Term | None


@dataclass(frozen=True, slots=True)
class RowView:
    cells: tuple[str, ...]
    term: Term | None


@dataclass(frozen=True, slots=True)
class TableView:
    """`hidden_caption`: the heading above says it, so that only a screen reader needs it again.
    `wide`: more than a telephone shows, which says that it can be scrolled."""

    kind: ClassVar[str] = "table"
    id: str
    caption: str
    hidden_caption: bool
    heads: tuple[HeadView, ...]
    rows: tuple[RowView, ...]
    notes: tuple[str, ...]
    total: bool
    wide: bool


@dataclass(frozen=True, slots=True)
class FigureView:
    id: str
    title: str
    svg: Markup
    table: TableView


@dataclass(frozen=True, slots=True)
class FiguresView:
    """Charts that follow one another, side by side where there is room."""

    kind: ClassVar[str] = "figures"
    figures: list[FigureView]


@dataclass(frozen=True, slots=True)
class SectionView:
    kind: ClassVar[str] = "section"
    id: str
    heading: HeadingView
    items: tuple[ItemView, ...]


ItemView = (
    HeadingView | ParagraphView | VerbatimView | FactsView | TableView | FiguresView | SectionView
)


@dataclass(frozen=True, slots=True)
class PartView:
    """A level-2 heading and all below it; the first part may have none."""

    heading: HeadingView | None
    items: list[ItemView]


NARROW = 44
"""Characters, gaps between columns counted as two, that a telephone shows of a table."""


def _is_wide(table: Table) -> bool:
    cells = [
        [column.header, *(row[i] for row in table.rows)] for i, column in enumerate(table.columns)
    ]
    widths = (max(len(line) for cell in column for line in cell.split("\n")) for column in cells)
    words = 20  # of the first column and others of words: these wrap
    return (
        sum(
            2 + (min(width, words) if i == 0 or column.words else width)
            for i, (column, width) in enumerate(zip(table.columns, widths, strict=True))
        )
        > NARROW
    )


class _Page:
    """Turns blocks into views; gives ids, and remembers which terms are linked to."""

    def __init__(self) -> None:
        self.title = ""
        self.contents: list[Entry] = []
        self.terms: set[str] = set()
        self._ids: set[str] = {"main", "definitions"}
        self._under = ""
        self._n_tables = 0
        self._level = 1
        self._said: set[str] = set()  # notes since the last heading of level 2

    def parts(self, blocks: Iterable[Block]) -> list[PartView]:
        parts = [PartView(None, [])]
        for block in blocks:
            match block:
                case Heading(text, 1) if not self.title:
                    self.title = self._under = clean(text)
                case Heading(text, 1 | 2):
                    heading = self._heading(text, 2)
                    self.contents.append(Entry(heading.id, heading.text))
                    parts.append(PartView(heading, []))
                case Section():
                    section = self._section(block, 0)
                    self.contents.append(Entry(section.heading.id, section.heading.text))
                    parts.append(PartView(None, [section]))
                case _:
                    self._add(parts[-1].items, block, 0)
        return [part for part in parts if part.heading or part.items]

    def _section(self, section: Section, deeper: int) -> SectionView:
        """A folded part; the blocks in it are a report of their own, whose title its title is."""
        heading = self._heading(section.title, deeper + 2)
        items: list[ItemView] = []
        with self._folded():
            for block in section.blocks:
                self._add(items, block, deeper + 1)
        return SectionView(f"{heading.id}-part", heading, tuple(items))

    @contextmanager
    def _folded(self) -> Iterator[None]:
        """What is folded away says its own notes, and says none for what is not."""
        said, self._said = self._said, set()
        yield
        self._said = said

    def _add(self, items: list[ItemView], block: Block, deeper: int) -> None:
        """One more block; its headings stand so many levels deeper than they say."""
        match block:
            case Heading(text, level):
                items.append(self._heading(text, deeper + level))
            case Paragraph(text, style):
                items.append(ParagraphView(clean(text), style))
            case Verbatim(lines):
                items.append(VerbatimView("\n".join(clean(line) for line in lines)))
            case Facts():
                items.append(self._facts(block))
            case Table():
                items.append(self._table(block))
            case Chart():
                if not items or not isinstance(items[-1], FiguresView):
                    items.append(FiguresView([]))
                last = items[-1]
                assert isinstance(last, FiguresView)
                last.figures.append(self._figure(block))
            case Section():
                items.append(self._section(block, deeper))

    def _heading(self, text: str, level: int) -> HeadingView:
        """No level is skipped on the way down."""
        self._under, self._n_tables = clean(text), 0
        if level == 2:
            self._said = set()
        self._level = min(level, self._level + 1, DEEPEST)
        return HeadingView(self._id(clean(text)), clean(text), self._level, self._term(text))

    def _facts(self, facts: Facts) -> FactsView:
        return FactsView(
            tuple(
                FactView(
                    clean(label), clean(text), style, self._term(label, facts.terms.get(label, ""))
                )
                for label, text, style in facts.items
            )
        )

    def _table(self, table: Table, caption: str = "") -> TableView:
        self._n_tables += 1
        number = f", table {self._n_tables}" if self._n_tables > 1 else ""
        own = clean(table.caption or caption)
        notes = [note for note in map(clean, table.notes) if note not in self._said]
        self._said.update(notes)
        return TableView(
            id=self._id("table"),
            caption=own or f"{self._under}{number}",
            hidden_caption=not clean(table.caption),
            heads=tuple(
                HeadView(
                    "\n".join(map(clean, column.header.split("\n"))),
                    not column.words and i > 0,
                    self._term(column.header, column.term),
                )
                for i, column in enumerate(table.columns)
            ),
            rows=tuple(
                RowView(tuple(map(clean, row)), self._term(row[0], table.terms.get(row[0], "")))
                for row in table.rows
            ),
            notes=tuple(notes),
            total=table.total,
            wide=_is_wide(table),
        )

    def _figure(self, chart: Chart) -> FigureView:
        id = self._id(chart.id)
        with self._folded():
            table = self._table(chart.table, f"Numbers of the figure: {clean(chart.title)}")
        return FigureView(id, clean(chart.title), _markup(figures.svg(chart, f"{id}-svg")), table)

    def _term(self, words: str, given: str = "") -> Term | None:
        term = term_of(words, given)
        if term is not None:
            self.terms.add(term.id)
        return term

    def _id(self, words: str) -> str:
        """An id that no other element of the page has."""
        base = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "part"
        if base[0].isdigit() or base.startswith("def-"):
            base = f"r-{base}"
        id, n = base, 1
        while id in self._ids or f"{id}-part" in self._ids:
            n += 1
            id = f"{base}-{n}"
        self._ids.update((id, f"{id}-part", f"{id}-c", f"{id}-svg-t", f"{id}-svg-d"))
        return id
