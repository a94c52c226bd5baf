"""Charts of one run, and of the acceptance of several: each with every number that it draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from speedbench.report.blocks import Axis, Chart, Column, Series, Table
from speedbench.report.curves import Distribution, Timeline
from speedbench.report.summary import Figure, Summary

NO_VALUE = "n/a"
NAN = math.nan
PERCENTILES = ("p50", "p95", "p99")


def of_acceptance(summary: Summary, prefix: str = "") -> dict[str, Chart]:
    """Histogram, rates by position and AL by category; none of a run without drafts."""
    if summary.draft_length == 0 or not sum(summary.histogram):
        return {}
    return {
        "histogram": _histogram(summary, prefix),
        "rates": _rates(summary, prefix),
        "categories": _categories(summary, prefix),
    }


def of_timing(summary: Summary, prefix: str = "") -> Iterator[Chart]:
    """Step time and TTFT, and what was in flight over time."""
    yield from _distributions(
        {"": summary}, f"{prefix}step-time", "Step time", "step_time_s", "steps"
    )
    yield from _distributions(
        {"": summary}, f"{prefix}ttft", "Time to first token (TTFT)", "ttft_s", "requests"
    )
    if summary.curves.timeline is not None:
        yield from _over_time(summary.curves.timeline, summary, prefix)


def of_repeats(runs: Mapping[str, Summary], prefix: str = "") -> Iterator[Chart]:
    """Step time and TTFT of several runs, a curve for each."""
    yield from _distributions(runs, f"{prefix}step-time", "Step time", "step_time_s", "steps")
    yield from _distributions(
        runs, f"{prefix}ttft", "Time to first token (TTFT)", "ttft_s", "requests"
    )


def of_arms(arms: Mapping[str, Summary]) -> Iterator[Chart]:
    """AL by arm, and by category where so many arms can be told apart in one figure."""
    drafting = {label: arm for label, arm in arms.items() if arm.draft_length > 0}
    if len(drafting) < 2:
        return
    yield _by_arm(drafting)
    if len(drafting) <= 4:
        yield _arms_by_category(drafting)


# ---------------------------------------------------------------- acceptance


def _histogram(summary: Summary, prefix: str) -> Chart:
    counts = summary.histogram
    total = sum(counts)
    most = max(range(len(counts)), key=counts.__getitem__)
    rows = tuple((str(n), str(count), f"{count / total:.4f}") for n, count in enumerate(counts, 1))
    return Chart(
        f"{prefix}histogram",
        "Acceptance histogram",
        f"{total} decode steps by the tokens they hold; most hold {most + 1}: "
        f"{counts[most] / total:.1%}.",
        Axis("Tokens in the step", "tokens"),
        Axis("Decode steps", "steps"),
        (Series("decode steps", "bar", _floats(range(1, len(counts) + 1)), _floats(counts)),),
        Table(
            (
                Column("Tokens in the step"),
                Column("Decode steps", term="histogram"),
                Column("Share of steps", term="histogram"),
            ),
            rows,
        ),
        repeated=True,
    )


def _rates(summary: Summary, prefix: str) -> Chart:
    places = _floats(range(len(summary.rates)))
    rows = tuple(
        (str(k), *_cells(rate), *_cells(joint))
        for k, (rate, joint) in enumerate(zip(summary.rates, summary.joint, strict=True), 1)
    )
    first = summary.rates[0].value
    last = summary.joint[-1].value
    return Chart(
        f"{prefix}rates",
        "Acceptance rate by draft position",
        f"Conditional rate of position 1: {_told(first)}; all {len(rows)} draft tokens accepted: "
        f"{_told(last)}. Over {summary.rates_over}.",
        Axis("Draft position", "tokens", ticks=tuple(row[0] for row in rows)),
        Axis("Acceptance rate", "probability", low=0.0, high=1.0),
        (
            _series("conditional", places, summary.rates),
            _series("joint", places, summary.joint),
        ),
        Table(
            (
                Column("Position"),
                *_columns("Conditional", "conditional_rate"),
                *_columns("Joint", "joint_rate"),
            ),
            rows,
        ),
        repeated=True,
    )


def _categories(summary: Summary, prefix: str) -> Chart:
    named = [
        *((row.name, row.lengths["al"], row.expected_al) for row in summary.categories),
        ("Overall", summary.lengths["al"], summary.expected_al),
    ]
    places = _floats(range(len(named)))
    series = [_series("measured", places, [al for _, al, _ in named])]
    columns = [Column("Category", words=True), *_columns("AL", "al")]
    rows: list[tuple[str, ...]] = [(name, *_cells(al)) for name, al, _ in named]
    if any(known is not None for _, _, known in named):
        values = tuple(NAN if known is None else known for _, _, known in named)
        series.append(Series("closed form", "point", places, values))
        columns.append(Column("Closed form"))
        rows = [
            (*row, NO_VALUE if known is None else f"{known:.4f}")
            for row, (_, _, known) in zip(rows, named, strict=True)
        ]
    return Chart(
        f"{prefix}al-by-category",
        "Acceptance length by category",
        f"Acceptance length of {len(named) - 1} categories; overall "
        f"{_told(summary.lengths['al'].value)} of at most {summary.draft_length + 1}.",
        Axis("Category", ticks=tuple(name for name, _, _ in named)),
        Axis("AL with 95 % intervals", "tokens per decode step", low=1.0),
        tuple(series),
        Table(tuple(columns), tuple(rows), total=True),
        horizontal=True,
        repeated=True,
    )


def _by_arm(arms: Mapping[str, Summary]) -> Chart:
    lengths = [arm.lengths["al"] for arm in arms.values()]
    places = _floats(range(len(lengths)))
    return Chart(
        "al-by-arm",
        "Acceptance length by arm",
        f"Acceptance length of {len(arms)} arms: "
        + "; ".join(f"{label} {_told(al.value)}" for label, al in zip(arms, lengths, strict=True))
        + ".",
        Axis("Arm", ticks=tuple(arms)),
        Axis("AL with 95 % intervals", "tokens per decode step", low=1.0),
        (_series("overall", places, lengths),),
        Table(
            (Column("Arm", words=True), *_columns("AL", "al")),
            tuple((label, *_cells(al)) for label, al in zip(arms, lengths, strict=True)),
        ),
        horizontal=True,
        repeated=True,
    )


def _arms_by_category(arms: Mapping[str, Summary]) -> Chart:
    names = sorted({row.name for arm in arms.values() for row in arm.categories})
    nothing = Figure(None, why_not="not in this arm")
    series, columns, cells = [], [], []
    for label, arm in arms.items():
        found = {row.name: row.lengths["al"] for row in arm.categories}
        figures = [found.get(name, nothing) for name in names]
        series.append(_series(label, _floats(range(len(names))), figures))
        columns += _columns(f"AL, {label}", "al")
        cells.append([_cells(figure) for figure in figures])
    return Chart(
        "al-by-category-and-arm",
        "Acceptance length by category and arm",
        f"Acceptance length of {len(arms)} arms in {len(names)} categories.",
        Axis("Category", ticks=tuple(names)),
        Axis("AL with 95 % intervals", "tokens per decode step", low=1.0),
        tuple(series),
        Table(
            (Column("Category", words=True), *columns),
            tuple(
                (name, *(cell for of_arm in cells for cell in of_arm[i]))
                for i, name in enumerate(names)
            ),
        ),
        horizontal=True,
        repeated=True,
    )


# ---------------------------------------------------------------- time


def _distributions(
    runs: Mapping[str, Summary], id: str, what: str, name: str, of_what: str
) -> Iterator[Chart]:
    """The empirical distribution of a time, in ms; nothing where no run has any."""
    curves = {
        label: (_curve(summary, name), summary.timing[name]) for label, summary in runs.items()
    }
    curves = {label: pair for label, pair in curves.items() if pair[1] is not None}
    if not curves:
        return
    series, rows, told = [], [], []
    for label, (curve, about) in curves.items():
        assert about is not None
        values = tuple(1e3 * v for v in curve.values)
        # All values are drawn, or points on the curve with straight lines between them.
        exact = about["n"] is not None and about["n"] <= len(values)
        mark: Literal["step", "line"] = "step" if exact else "line"
        series.append(Series(label or what.split(" (")[0], mark, values, curve.shares))
        rows += [
            (*((label,) if len(runs) > 1 else ()), f"{x:.4f}", f"{share:.6f}")
            for x, share in zip(values, curve.shares, strict=True)
        ]
        marks = [(p, 1e3 * (about[p] or 0.0)) for p in PERCENTILES]
        if len(runs) == 1:
            shares = tuple(int(p[1:]) / 100 for p in PERCENTILES)
            names = tuple(p.upper() for p in PERCENTILES)
            all_three = ", ".join(f"{p.upper()} {x:.4g} ms" for p, x in marks)
            series.append(
                Series(all_three, "point", tuple(x for _, x in marks), shares, names=names)
            )
            rows += [
                (f"{x:.4f}", f"{share:.6f} ({p.upper()})")
                for (p, x), share in zip(marks, shares, strict=True)
            ]
        words = ", ".join(f"{p.upper()} {x:.4g}" for p, x in marks)
        told.append(f"{label + ': ' if label else ''}{words} ms of {about['n']:.0f} {of_what}")
    smallest = min(s.x[0] for s in series)
    largest = max(s.x[-1] for s in series)
    term = {"ttft_s": "ttft", "step_time_s": "step_time"}[name]
    share = f"Share of {of_what} at or below"
    yield Chart(
        id,
        f"{what}: distribution",
        f"{what}, share of {of_what} at or below each value: {'; '.join(told)}.",
        Axis(what, "ms", log=smallest > 0 and largest > 5 * smallest),
        Axis(share, "fraction", low=0.0, high=1.0),
        tuple(series),
        Table(
            (
                *((Column("Run", words=True),) if len(runs) > 1 else ()),
                Column(f"{what} (ms)", term=term),
                Column(share, term="share_at_most"),
            ),
            tuple(rows),
        ),
        repeated=True,
    )


def _curve(summary: Summary, name: str) -> Distribution:
    return {"ttft_s": summary.curves.ttft_s, "step_time_s": summary.curves.step_time_s}[name]


def _over_time(found: Timeline, summary: Summary, prefix: str) -> Iterator[Chart]:
    edges = found.edges_s
    width_s = edges[1] - edges[0]
    spans = ((*found.steady_s, "steady window"),) if found.steady_s else ()
    steady = (
        f"the steady window lasts from {found.steady_s[0]:.4g} to {found.steady_s[1]:.4g} s"
        if found.steady_s
        else "there was no steady window"
    )
    for id, what, unit, values, term, how in (
        (
            "requests",
            "Requests in flight",
            "requests",
            found.requests,
            "in_flight",
            f"mean of each {width_s:.3g} s",
        ),
        (
            "tokens",
            "Tokens in flight",
            "tokens",
            found.tokens,
            "tokens_in_flight",
            f"prompt and output, mean of each {width_s:.3g} s",
        ),
        (
            "output",
            "Output rate",
            "tokens/s",
            found.output_tps,
            "output_rate",
            f"over each {width_s:.3g} s",
        ),
    ):
        yield Chart(
            f"{prefix}{id}-over-time",
            f"{what} over time",
            f"{what}, {how}: at most {max(values):.4g} {unit}; {steady}.",
            Axis("Time since the start", "s", low=0.0),
            Axis(f"{what}, {how}", unit, low=0.0),
            (Series(what, "step", edges, (*values, values[-1])),),
            Table(
                (
                    Column("From (s)", term="run_time"),
                    Column("To (s)", term="run_time"),
                    Column(f"{what} ({unit})", term=term),
                ),
                tuple(
                    (f"{edges[i]:.4f}", f"{edges[i + 1]:.4f}", f"{value:.4f}")
                    for i, value in enumerate(values)
                ),
                notes=(f"{steady[0].upper()}{steady[1:]}.",),
            ),
            spans=spans,
            repeated=True,
        )


# ---------------------------------------------------------------- numbers


def _floats(values: Sequence[int] | range) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _series(label: str, places: tuple[float, ...], figures: Sequence[Figure]) -> Series:
    return Series(
        label,
        "point",
        places,
        tuple(NAN if f.value is None else f.value for f in figures),
        tuple(NAN if f.interval is None else f.interval[0] for f in figures),
        tuple(NAN if f.interval is None else f.interval[1] for f in figures),
    )


def _columns(what: str, term: str) -> list[Column]:
    return [
        Column(what, term=term),
        Column("95 % from", term="interval"),
        Column("95 % to", term="interval"),
    ]


def _cells(figure: Figure) -> tuple[str, str, str]:
    low, high = figure.interval or (None, None)
    return _told(figure.value), _told(low), _told(high)


def _told(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.4f}"
