"""Console: a report on a terminal of any width; no number is ever cut."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from speedbench.report import layout
from speedbench.report.blocks import (
    Block,
    Chart,
    Column,
    Facts,
    Heading,
    Paragraph,
    Section,
    Table,
    Verbatim,
    as_text,
    clean,
)
from speedbench.report.summary import Summary

STYLES = {"plain": "", "error": "bold red", "warning": "yellow", "note": "dim"}
WORDS_WIDTH = 20
"""Columns of words are not made narrower than this while there is another way to fit."""

ROOMY, COMPACT, DENSE = range(3)
"""Styles of a table: every line drawn; columns two blanks apart; one blank apart."""


def render(summary: Summary, console: Console) -> None:
    """Print the report of one run."""
    draw(layout.of_run(summary), console)


def draw(blocks: Iterable[Block], console: Console) -> None:
    """Print any report; its long parts are only named."""
    for block in as_text(blocks, brief=True):
        match block:
            case Heading(text, level):
                if level > 1:
                    console.print()
                console.print(Text(clean(text), "bold" if level < 3 else "italic"))
            case Paragraph(text, style):
                console.print(Text(clean(text), STYLES[style]))
            case Verbatim(lines):
                for line in lines:
                    console.print(Text(clean(line)))
            case Facts():
                console.print(_facts(block))
            case Table():
                if block.caption:
                    console.print(Text(clean(block.caption), "italic"))
                _draw_table(block, console)
            case Chart() | Section():
                raise AssertionError("as_text leaves none")


def _facts(facts: Facts) -> RichTable:
    """Labels, and beside them text that wraps within its own column."""
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text, style in facts.items:
        grid.add_row(Text(clean(label), STYLES[style] or "dim"), Text(clean(text), STYLES[style]))
    return grid


def _draw_table(table: Table, console: Console) -> None:
    """With all its lines where there is room, else without; wider than the terminal before a
    number is cut."""
    cells, gaps = _cells_width(table), len(table.columns) - 1
    needed = (cells + 3 * gaps + 4, cells + 2 * gaps, cells + gaps)
    style = next((s for s in (ROOMY, COMPACT) if needed[s] <= console.width), DENSE)
    drawn = RichTable(
        box=box.HEAVY_HEAD if style == ROOMY else box.SIMPLE_HEAD,
        padding=((0, 1), (0, 1, 0, 0), 0)[style],
        pad_edge=style == ROOMY,
        show_edge=style == ROOMY,
        width=needed[DENSE] if needed[DENSE] > console.width else None,
        header_style="bold",
    )
    for column in table.columns:
        drawn.add_column(
            Text(column.header),
            justify="left" if column.words or column is table.columns[0] else "right",
            no_wrap=not column.words,
            overflow="fold",
            vertical="top",
        )
    for row in table.rows:
        if table.total and row is table.rows[-1]:
            drawn.add_section()
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    console.print(drawn, crop=False)
    for note in table.notes:
        console.print(Text(clean(note), "dim"))


def _cells_width(table: Table) -> int:
    """Characters that the cells of a row need at least."""
    return sum(
        _column_width(column, [row[i] for row in table.rows])
        for i, column in enumerate(table.columns)
    )


def _column_width(column: Column, cells: list[str]) -> int:
    widest = max(cell_len(clean(text)) for text in [*column.header.split("\n"), *cells])
    return min(widest, WORDS_WIDTH) if column.words else widest
