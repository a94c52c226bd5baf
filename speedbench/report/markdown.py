"""Markdown: a report as GitHub renders it; text from the data can form no markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from speedbench.report import layout
from speedbench.report.blocks import Block, Facts, Heading, Paragraph, Table, Verbatim, clean
from speedbench.report.pair import PairSummary
from speedbench.report.summary import Summary

_SPECIAL = re.compile(r"[\\`*|\[\]~#@]|(?<![^\W_])_|_(?![^\W_])")
"""What GitHub may take for markup (an underscore within a word it does not)."""


def render(summary: Summary) -> str:
    """The report of one run."""
    return _join(layout.of_run(summary))


def render_pair(pair: PairSummary) -> str:
    """The report of a baseline and a speculative run."""
    return _join(layout.of_pair(pair))


def _join(blocks: Iterable[Block]) -> str:
    return "\n\n".join("\n".join(_lines(block)) for block in blocks) + "\n"


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
        case Table():
            yield from _table(block)


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
