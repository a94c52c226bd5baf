"""CSV: a report as one line per number, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from speedbench.report.blocks import clean
from speedbench.report.rows import Row

HEADER = tuple(Row.__slots__)


def render(rows: Iterable[Row]) -> str:
    """Full precision; what is not known is an empty cell with its reason in `why_not`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in HEADER])
    return out.getvalue()


def _cell(value: object) -> str:
    """A spreadsheet takes text that begins with = + - @ for a formula: a quote says it is none."""
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return quoted(value) if isinstance(value, str) else clean(str(value))


def quoted(text: str) -> str:
    """Text of a cell: one line, and none that a spreadsheet would compute."""
    text = clean(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
