"""The page of a built split: one HTML file that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import fmean

from speedbench.datasets.selection import CategoryResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #d5dae0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg text { font: 12px system-ui, sans-serif; fill: #1b1f24; }
"""

WIDTH, LEFT, RIGHT, LINE, TOP, BOTTOM = 900, 170, 30, 26, 34, 40
SELECTED, RANDOM, POOL = "#0b6e4f", "#6b7785", "#b3541e"


def page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ]
    return "\n".join([*lines, "</table>"])


def similarity_figure(results: Sequence[CategoryResult]) -> str:
    """Per category on one axis: the selection (dot), random picks (their range and mean), the pool
    (tick)."""
    results = [result for result in results if result.selected is not None]
    if not results:
        return ""
    values = [value for result in results for value in _values(result)]
    low, high, step = _axis(min(values), max(values))

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    bottom = TOP + LINE * len(results)
    marks = [_legend()]
    for tick in range(round(low / step), round(high / step) + 1):
        at = x(tick * step)
        marks.append(_line(at, TOP, at, bottom, "#e3e7eb"))
        marks.append(_text(at, bottom + 16, f"{tick * step:.3g}", "middle"))
    marks.append(
        _text((LEFT + WIDTH) / 2, bottom + 34, "mean cosine similarity per pair", "middle")
    )
    for place, result in enumerate(results):
        y = TOP + LINE * (place + 0.5)
        marks.append(_text(LEFT - 10, y + 4, result.category, "end"))
        marks += _strip(result, x, y)
    size = f'width="{WIDTH}" height="{bottom + BOTTOM}" viewBox="0 0 {WIDTH} {bottom + BOTTOM}"'
    label = "mean cosine similarity of the selection, of random picks and of the pool"
    return f'<svg {size} role="img" aria-label="{label}">\n' + "\n".join(marks) + "\n</svg>"


def _values(result: CategoryResult) -> list[float]:
    own = [value for value in (result.selected, result.pool) if value is not None]
    return [*own, *result.random]


def _axis(least: float, most: float) -> tuple[float, float, float]:
    """Ends and step of an axis with four to ten round steps."""
    span = max(most - least, 1e-6)
    step = 10.0 ** math.floor(math.log10(span))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if span / (step * factor) <= 8)
    return math.floor(least / step) * step, (math.floor(most / step) + 1) * step, step


def _strip(result: CategoryResult, x: Callable[[float], float], y: float) -> list[str]:
    marks = []
    if result.random:
        marks.append(_line(x(min(result.random)), y, x(max(result.random)), y, RANDOM, 5))
        marks.append(
            _line(x(fmean(result.random)), y - 6, x(fmean(result.random)), y + 6, RANDOM, 2)
        )
    if result.pool is not None:
        marks.append(_line(x(result.pool), y - 9, x(result.pool), y + 9, POOL, 2))
    if result.selected is not None:
        title = f"{result.category}: {result.selected:.4f}"
        marks.append(_dot(x(result.selected), y, title))
    return marks


def _legend() -> str:
    return "\n".join(
        [
            _dot(LEFT + 6, 14, "selection"),
            _text(LEFT + 16, 18, "selection"),
            _line(LEFT + 100, 14, LEFT + 120, 14, RANDOM, 5),
            _text(LEFT + 126, 18, "random picks: range and mean"),
            _line(LEFT + 350, 5, LEFT + 350, 23, POOL, 2),
            _text(LEFT + 358, 18, "whole pool"),
        ]
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _dot(x: float, y: float, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{SELECTED}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
