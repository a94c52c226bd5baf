"""Markdown: a report as GitHub renders it; text from the data can form no markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from speedbench.report import layout
from speedbench.report.blocks import (
    Block,
    Chart,
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

_SPECIAL = re.compile(r"[\\`*|\[\]~#@]|(?<![^\W_])_|_(?![^\W_])")
"""What GitHub may take for markup (an underscore within a word it does not)."""


def render(summary: Summary) -> str:
    """The report of one run."""
    return write(layout.of_run(summary))


def write(blocks: Iterable[Block]) -> str:
    """Any report."""
    return "\n\n".join("\n".join(_lines(block)) for block in as_text(blocks)) + "\n"


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Heading(text, level):
            yield f"{'#' * level} {escape(text)}"
        case Paragraph(text, style):
            yield f"**{escape(text)}**" if style == "error" else escape(text)
        case Verbatim(lines):
            yield from ("```", *(clean(line).replace("```", "") for line in lines), "```")
        case Facts(items):
            yield from (f"- **{escape(label)}** {escape(text)}" for label, text, _ in items)
        case Table(caption=caption):
            if caption:
                yield from (f"*{escape(caption)}*", "")
            yield from _table(block)
        case Chart() | Section():
            raise AssertionError("as_text leaves none")


def _table(table: Table) -> Iterator[str]:
    yield _row(escape(column.header) for column in table.columns)
    yield _row(
        "---" if column.words or i == 0 else "---:" for i, column in enumerate(table.columns)
    )
    for row in table.rows:
        total = table.total and row is table.rows[-1]
        yield _row(f"**{escape(cell)}**" if total and cell else escape(cell) for cell in row)
    for note in table.notes:
        yield ""
        yield f"<sub>{escape(note)}</sub>"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """One line of text that means itself: neither markup, nor HTML, nor a mention."""
    text = _SPECIAL.sub(r"\\\g<0>", clean(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
