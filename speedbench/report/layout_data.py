"""Layout of data: what prepared data holds, and how a split was selected or cut, as blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from speedbench.report.blocks import (
    Axis,
    Block,
    Chart,
    Column,
    Facts,
    Heading,
    Paragraph,
    Series,
    Table,
)

if TYPE_CHECKING:
    from speedbench.datasets.bucket import Bucket
    from speedbench.datasets.overview import Overview, Part
    from speedbench.datasets.selection import CategoryResult

NO_VALUE = "n/a"
N_SHOWN = 20
"""Rows over the limit that a table lists; json has all of them."""


# ---------------------------------------------------------------- prepared data


def of_overview(
    found: Overview, built: Path | None, tokens: str, limit: int | None, number: int = 1
) -> Iterator[Block]:
    """One dataset, the `number`-th of its report.

    built   the report of the command that made it from other rows, if there is one
    tokens  what the numbers of tokens are; '' without a tokenizer
    """
    yield Heading(str(found.path))
    yield Facts(tuple((label, text, "plain") for label, text in _identity(found, built).items()))
    if found.fault:
        yield Paragraph(found.fault, "error")
    yield _parts_table(found, tokens, limit)
    if tokens:
        yield _lengths_chart(found, tokens, limit, number)
    if limit is not None:
        yield from _over(found, limit)


def _identity(found: Overview, built: Path | None) -> dict[str, str]:
    identity = found.identity
    facts = {"rows sha256": found.sha256}
    if identity is None:
        told = f"built as {built} says" if built else "none: not from `speedbench prepare`"
        return {"identity": told, **facts}
    source, tool = identity["source"], identity["preparer"]
    facts = {"source": f"{source['repository']} at {source['revision']}", **facts}
    if tool is not None:
        facts["preparer"] = f"{tool['repository']} at {tool['commit']}"
    first = identity["licences"][0]["name"] if identity["licences"] else "none was shown"
    facts["licences"] = first + (
        f", and those of {len(identity['licences']) - 1} sources"
        if len(identity["licences"]) > 1
        else ""
    )
    return {**facts, "prepared": identity["prepared_utc"]}


def _parts_table(found: Overview, tokens: str, limit: int | None) -> Table:
    columns = ["category", "rows", "requests", "turns\nmedian", "turns\nmax"]
    if tokens:
        columns += ["tokens\nmin", "tokens\nmedian", "tokens\np95", "tokens\nmax"]
    if limit is not None:
        columns.append(f"over\n{limit}")
    rows = []
    for part in (*found.parts, found.total):
        cells = [part.name, part.n_rows, part.n_requests]
        cells += [f"{part.turns.median:g}", part.turns.maximum]
        if part.tokens is not None:
            t = part.tokens
            cells += [t.minimum, f"{t.median:g}", t.p95, t.maximum]
        if limit is not None:
            cells.append(part.n_over)
        rows.append(tuple(map(str, cells)))
    notes = (tokens,) if tokens else ()
    return Table(tuple(Column(name) for name in columns), tuple(rows), notes, total=True)


def _lengths_chart(found: Overview, tokens: str, limit: int | None, number: int) -> Chart:
    parts = [part for part in (*found.parts, found.total) if part.tokens is not None]
    known = [part.tokens for part in parts if part.tokens is not None]
    places = tuple(map(float, range(len(known))))
    median = Series(
        "median, and from the shortest to the longest",
        "point",
        places,
        tuple(t.median for t in known),
        tuple(float(t.minimum) for t in known),
        tuple(float(t.maximum) for t in known),
        bounds="all",
    )
    p95 = Series("95 % are no longer", "point", places, tuple(float(t.p95) for t in known))
    total = known[-1]
    over = "" if limit is None else f"; {found.total.n_over} rows exceed {limit}"
    return Chart(
        f"lengths-{number}",
        "Tokens of the longest prompt of a row",
        f"Over all {found.total.n_rows} rows: median {total.median:g}, from {total.minimum} to "
        f"{total.maximum}, 95 % at most {total.p95}{over}.",
        Axis("Category", ticks=tuple(part.name for part in parts)),
        Axis("Longest prompt of a row", "tokens", low=0.0),
        (median, p95),
        _lengths_table(parts, tokens),
        reference=None if limit is None else float(limit),
        horizontal=True,
        repeated=True,
    )


def _lengths_table(parts: Sequence[Part], tokens: str) -> Table:
    return Table(
        (
            Column("category", words=True),
            *map(Column, ("shortest", "median", "95 % at most", "longest")),
        ),
        tuple(
            (part.name, str(t.minimum), f"{t.median:g}", str(t.p95), str(t.maximum))
            for part in parts
            if (t := part.tokens) is not None
        ),
        (tokens,),
        total=True,
    )


def _over(found: Overview, limit: int) -> Iterator[Block]:
    if not found.over:
        yield Paragraph(f"No row exceeds {limit} tokens.")
        return
    yield Paragraph(f"{len(found.over)} rows exceed {limit} tokens:", "warning")
    shown = [(name, category, str(n)) for name, category, n in found.over[:N_SHOWN]]
    more = len(found.over) - len(shown)
    yield Table(
        (Column("row", words=True), Column("category", words=True), Column("prompt\ntokens")),
        tuple(shown),
        (f"and {more} more: --format json lists all",) if more else (),
    )


# ---------------------------------------------------------------- a selected split

SIMILARITY = "Mean cosine similarity per pair of rows of a category; lower is more diverse."


def of_selection(report: Mapping[str, Any], results: Sequence[CategoryResult]) -> Iterator[Block]:
    """How alike the rows of a selected split are, against random picks and the whole pool."""
    yield Heading("A selected split", 1)
    yield Facts(
        (
            ("rows", f"{report['rows']} of {report['pool']['rows']:,} rows of "
                     f"{report['pool']['file']}", "plain"),
            ("seed", str(report["seed"]), "plain"),
            ("rows sha256", report["sha256"], "plain"),
            ("embeddings", ", ".join(f"{k} {v}" for k, v in report["embeddings"].items()),
             "plain"),
        )
    )  # fmt: skip
    yield Heading("How alike the rows are")
    yield Paragraph(
        f"{SIMILARITY} Random picks: as many rows, drawn at random with "
        f"{len(report['categories'][0]['random'])} seeds; mean ± standard deviation. "
        "Pool: exact, over all pairs of the category."
    )
    yield _similarity_table(report["categories"])
    drawn = [result for result in results if result.selected is not None]
    if drawn:
        yield _similarity_chart(drawn)


def _similarity_table(categories: Sequence[Mapping[str, Any]]) -> Table:
    headers = ("candidates", "chosen", "selection", "random picks", "pool", "below random")
    rows = tuple(
        (
            item["category"],
            f"{item['n_pool']:,}",
            str(item["n"]),
            _number(item["selected"]),
            f"{_number(item['random_mean'])} ± {_number(item['random_stdev'])}",
            _number(item["pool"]),
            NO_VALUE if item["below_random"] is None else f"{item['below_random']:.1%}",
        )
        for item in categories
    )
    return Table((Column("category", words=True), *map(Column, headers)), rows)


def _similarity_chart(results: Sequence[CategoryResult]) -> Chart:
    places = tuple(map(float, range(len(results))))
    series = (
        Series("selection", "point", places, tuple(_known(r.selected) for r in results)),
        Series(
            "random picks: mean, lowest and highest",
            "point",
            places,
            tuple(fmean(r.random) if r.random else math.nan for r in results),
            tuple(min(r.random, default=math.nan) for r in results),
            tuple(max(r.random, default=math.nan) for r in results),
            bounds="all picks",
        ),
        Series("whole pool", "point", places, tuple(_known(r.pool) for r in results)),
    )
    told = "; ".join(f"{r.category} {_number(r.selected)}" for r in results)
    table = Table(
        (
            Column("category", words=True),
            *map(Column, ("selection", "random mean", "lowest", "highest", "pool")),
        ),
        tuple(
            (
                r.category,
                _number(r.selected),
                *(_number(of(r.random) if r.random else None) for of in (fmean, min, max)),
                _number(r.pool),
            )
            for r in results
        ),
    )
    return Chart(
        "similarity",
        "Similarity of the selection, of random picks and of the pool",
        f"Mean cosine similarity of the selection: {told}.",
        Axis("Category", ticks=tuple(r.category for r in results)),
        Axis("Mean cosine similarity per pair"),
        series,
        table,
        horizontal=True,
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.4f}"


# ---------------------------------------------------------------- buckets


def of_buckets(report: Mapping[str, Any], built: Sequence[Bucket]) -> Iterator[Block]:
    """What was cut and padded, and what could not be made exact."""
    given_by, thresholds = report["tiers"]["given_by"], report["tiers"]["thresholds"]
    cuts = f", cut at {thresholds[0]:.4g} and {thresholds[1]:.4g}" if thresholds else ""
    yield Heading("Throughput buckets", 1)
    yield Paragraph(
        f"Every prompt has exactly its bucket's length under the tokenizer {report['tokenizer']}, "
        f"counted again in the written file. Counted is {report['counted_means']}. 1k is "
        f"{report['tokens_per_k']} tokens."
    )
    yield Paragraph(
        f"From {report['from']['rows']:,} rows of {report['from']['file']}; tiers by the "
        f"{given_by}{cuts}; padding: {report['padding']}; seed {report['seed']}."
    )
    for values, found in zip(report["buckets"], built, strict=True):
        yield Heading(f"{found.name}: {len(found.rows)} rows")
        for warning in values["warnings"]:
            yield Paragraph(f"Warning: {warning}.", "warning")
        yield Table(
            (Column("tier", words=True), *map(Column, ("rows", "as they were", "cut", "padded"))),
            tuple((tier, *map(str, n.values())) for tier, n in values["tiers"].items()),
        )
        if found.inexact:
            yield Paragraph("Not written, because they cannot be made exact:")
            names = ("row", "tier", "reason")
            yield Table(tuple(Column(name, words=True) for name in names), tuple(found.inexact))
