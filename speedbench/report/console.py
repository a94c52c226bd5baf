"""Console: a report on a terminal of any width; no number is ever cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

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

INTERVAL = "95 % interval"
"""Header of columns that hold the interval of the column before."""

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
                console.print(_facts(block, console.width))
            case Table():
                if block.caption:
                    console.print(Text(clean(block.caption), "italic"))
                _draw_table(block, console)
            case Chart() | Section():
                raise AssertionError("as_text leaves none")


def _facts(facts: Facts, width: int) -> RichTable:
    """Labels, and beside them text that wraps within its own column. Long labels wrap, too, so that
    the text keeps two thirds of the width."""
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(max_width=max(WORDS_WIDTH, width // 3), overflow="fold")
    grid.add_column(overflow="fold")
    for label, text, style in facts.items:
        grid.add_row(Text(clean(label), STYLES[style] or "dim"), Text(clean(text), STYLES[style]))
    return grid


def _draw_table(table: Table, console: Console) -> None:
    """With all its lines where there is room, else without; of a terminal that is narrower still,
    see `_fitting`."""
    for part in _fitting(_cleaned(table), console.width):
        needed = _needed(part)
        style = next((s for s in (ROOMY, COMPACT) if needed[s] <= console.width), DENSE)
        drawn = RichTable(
            box=box.HEAVY_HEAD if style == ROOMY else box.SIMPLE_HEAD,
            padding=((0, 1), (0, 1, 0, 0), 0)[style],
            pad_edge=style == ROOMY,
            show_edge=style == ROOMY,
            width=needed[DENSE] if needed[DENSE] > console.width else None,
            header_style="bold",
        )
        for column in part.columns:
            drawn.add_column(
                Text(column.header),
                justify="left" if column.words or column is part.columns[0] else "right",
                no_wrap=not column.words,
                overflow="fold",
                vertical="top",
            )
        for row in part.rows:
            if part.total and row is part.rows[-1]:
                drawn.add_section()
            drawn.add_row(*map(Text, row))
        console.print(drawn, crop=False)
    for note in table.notes:
        console.print(Text(clean(note), "dim"))


def _cleaned(table: Table) -> Table:
    """With harmless cells and headers: line breaks in them are ours from here on."""
    return replace(
        table,
        columns=tuple(
            replace(column, header="\n".join(map(clean, column.header.split("\n"))))
            for column in table.columns
        ),
        rows=tuple(tuple(map(clean, row)) for row in table.rows),
    )


# ---------------------------------------------------------------- tables that are too wide


def _fitting(table: Table, width: int) -> list[Table]:
    """The table, or if it is too wide, with every interval below its value; or if that is too wide,
    in parts that each repeat the first column."""
    if _needed(table)[DENSE] <= width:
        return [table]
    stacked = _stacked(table)
    if _needed(stacked)[DENSE] <= width:
        return [stacked]
    parts: list[Table] = []
    first = 1
    while first < len(stacked.columns):
        end = first + 1
        while end < len(stacked.columns):
            if _needed(_picked(stacked, first, end + 1))[DENSE] > width:
                break
            end += 1
        parts.append(_picked(stacked, first, end))
        first = end
    return parts or [stacked]


def _stacked(table: Table) -> Table:
    """Intervals go below the values that they follow, in the same column."""
    columns: list[Column] = []
    rows: list[list[str]] = [[] for _ in table.rows]
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in table.rows]
        if i and not column.words:
            cells = [cell.replace(" (", "\n(", 1) for cell in cells]
        under = len(columns) > 1 and not columns[-1].words
        if under and clean(column.header) == INTERVAL:
            columns[-1] = replace(columns[-1], header=f"{columns[-1].header}\n95 %")
            for row, cell in zip(rows, cells, strict=True):
                row[-1] += f"\n{cell}" if cell else ""
        else:
            columns.append(column)
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    return replace(table, columns=tuple(columns), rows=tuple(map(tuple, rows)))


def _picked(table: Table, start: int, end: int) -> Table:
    """The first column, and those from start to end."""
    return replace(
        table,
        columns=(table.columns[0], *table.columns[start:end]),
        rows=tuple((row[0], *row[start:end]) for row in table.rows),
    )


def _needed(table: Table) -> tuple[int, int, int]:
    """Characters that a line needs at least, in each style."""
    gaps = len(table.columns) - 1
    cells = sum(
        _column_width(column, [row[i] for row in table.rows])
        for i, column in enumerate(table.columns)
    )
    return cells + 3 * gaps + 4, cells + 2 * gaps, cells + gaps


def _column_width(column: Column, cells: list[str]) -> int:
    lines = [line for text in (column.header, *cells) for line in text.split("\n")]
    widest = max(map(cell_len, lines))
    return min(widest, WORDS_WIDTH) if column.words else widest
