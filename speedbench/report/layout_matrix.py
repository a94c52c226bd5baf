"""Layout of the matrix: the table that AIPerf's `speed-bench-report` prints, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from speedbench.report.as_csv import quoted
from speedbench.report.blocks import Block, Column, Heading, Table
from speedbench.report.matrix import NOTES, Matrix, MatrixRow, Metric
from speedbench.report.summary import Figure

TITLES: Mapping[Metric, str] = {
    "accept_length": "Acceptance Length Report",
    "accept_rate": "Acceptance Rate Report",
    "throughput": "Throughput Report (tokens/sec)",
}
TERMS: Mapping[Metric, str] = {
    "accept_length": "al",
    "accept_rate": "acceptance_rate",
    "throughput": "output_tps",
}
"""What the cells are: ids of definitions."""

NO_VALUE, NOT_ASKED = "n/a", "-"


def of_matrix(matrix: Matrix) -> Iterator[Block]:
    yield Heading(TITLES[matrix.metric], 1)
    yield table(matrix)


def table(matrix: Matrix) -> Table:
    """A line for each run, and two below it with the bounds of its 95 % intervals."""
    headers = (*matrix.categories, "Overall")
    rows = []
    why: dict[str, list[str]] = {}
    for row in matrix.rows:
        figures = _figures(matrix, row)
        rows.append((row.model, *(_cell(figure) for figure in figures)))
        bounds = [figure.interval if figure else None for figure in figures]
        if any(bounds):
            for side, words in enumerate(("95 % from", "95 % to")):
                rows.append((words, *(f"{b[side]:.4f}" if b else "" for b in bounds)))
        for name, figure in zip(headers, figures, strict=True):
            told = figure is not None and not figure.why_not.startswith("category ")
            if figure is not None and figure.why_not and told:
                what = NO_VALUE if figure.value is None else "no interval"
                why.setdefault(f"{what}: {figure.why_not}", []).append(f"{row.model}, {name}")
    return Table(
        (Column("Model"), *(Column(name, term=TERMS[matrix.metric]) for name in headers)),
        tuple(rows),
        (NOTES[matrix.metric], *(f"{reason} ({_some(places)})" for reason, places in why.items())),
    )


def to_csv(matrix: Matrix) -> str:
    """Model, the categories, Overall: values alone, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["Model", *map(quoted, matrix.categories), "Overall"])
    for row in matrix.rows:
        cells = (
            f"{figure.value:.4f}" if figure and figure.value is not None else ""
            for figure in _figures(matrix, row)
        )
        writer.writerow([quoted(row.model), *cells])
    return out.getvalue()


def _figures(matrix: Matrix, row: MatrixRow) -> list[Figure | None]:
    """In the order of the columns; None of a category that the run was not to measure."""
    return [*(row.cells.get(name) for name in matrix.categories), row.overall]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return NOT_ASKED
    return NO_VALUE if figure.value is None else f"{figure.value:.4f}"


def _some(places: Sequence[str]) -> str:
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return "; ".join(places[:3]) + more
