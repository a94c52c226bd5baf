"""Layout of losslessness: how many outputs are the baseline's, and where others part, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from speedbench.lossless import (
    Divergence,
    Greedy,
    Identical,
    Losslessness,
    Sampled,
    TwoSample,
    Verdict,
)
from speedbench.report.blocks import (
    Axis,
    Block,
    Chart,
    Column,
    Heading,
    Paragraph,
    Series,
    Style,
    Table,
)
from speedbench.report.layout import listed
from speedbench.report.summary import Figure

TITLE = "Losslessness"
NO_VALUE = "n/a"
FLOOR = "between baseline runs"

STYLES: Mapping[str, Style] = {
    "same": "plain", "no more": "plain", "unseen": "plain", "more": "error", "unknown": "warning",
}  # fmt: skip

HOW_GREEDY = (
    "A comparison is one request (one turn) in one run of the arm and one of the baseline, where "
    "both were asked the very same prompt; the floor compares the baseline's own runs with each "
    "other. Over all: the mean over categories. Points: share identical less the floor."
)
HOW_SAMPLED = (
    "At temperature > 0 outputs differ by design. The test swaps both arms' answers within "
    "conversations, whole conversations at a time (all turns and repeats), which changes nothing "
    "if both arms answer a prompt with the same distribution. It looks at how often each token "
    "occurs and at how long the answers are. It can see other words, another language, endless or "
    "cut-off answers. It cannot see the same tokens in another order, nor a change that some "
    "prompts make up for others, nor, with few conversations, a small one: finding nothing proves "
    "nothing. Categories are exploratory, adjusted (Holm) for their number."
)
HOW = (HOW_GREEDY, HOW_SAMPLED)
"""What stands between the verdicts and their numbers."""


def of_losslessness(found: Sequence[tuple[str, Losslessness]]) -> Iterator[Block]:
    """Of every arm, by its label."""
    if not found:
        return
    yield Heading(TITLE)
    yield from verdicts(found)
    yield from numbers(found)


def verdicts(found: Sequence[tuple[str, Losslessness]]) -> Iterator[Block]:
    """On every arm; one that several share is told once."""
    whose: dict[Verdict, list[str]] = {}
    for label, one in found:
        whose.setdefault(one.verdict, []).append(label)
    for verdict, labels in whose.items():
        every = len(labels) == len(found) > 1
        name = "every arm" if every else listed(labels)
        yield Paragraph(f"{name}: {verdict.sentence}", STYLES[verdict.kind])


def numbers(found: Sequence[tuple[str, Losslessness]]) -> Iterator[Block]:
    """What the verdicts rest on, of arms that were held against the same base."""
    greedy = [(label, one) for label, one in found if isinstance(one, Greedy)]
    sampled = [(label, one) for label, one in found if isinstance(one, Sampled)]
    if greedy:
        yield Paragraph(HOW_GREEDY)
        for label, one in greedy:
            if len(found) > 1:
                yield Paragraph(f"{label}:")
            yield _shares(one)
        yield from _positions(greedy)
    if sampled:
        yield Paragraph(HOW_SAMPLED)
        for label, two in sampled:
            if len(found) > 1:
                yield Paragraph(f"{label}:")
            yield _tests(two)


# ---------------------------------------------------------------- temperature 0


def _shares(found: Greedy) -> Table:
    notes: dict[str, None] = {}
    rows = [_row(row, notes) for row in (*found.by_category, found.overall)]
    left_out = found.overall.n_left_out
    if left_out:
        notes[
            f"{left_out} comparison(s) are left out: an earlier turn was answered otherwise, and "
            "the prompts are not the same any more (--history frozen keeps them the same)"
        ] = None
    if found.n_missing:
        notes[f"{found.n_missing} answer(s) have no counterpart on the other side"] = None
    interval = "95 %\ninterval"
    headers = ("Identical", "Share", interval, "Floor", interval, "Points", interval)
    return Table(
        (Column("Category", words=True), *(Column(header) for header in headers)),
        tuple(rows),
        tuple(notes),
        total=True,
    )


def _row(row: Identical, notes: dict[str, None]) -> tuple[str, ...]:
    figures = (("share", row.share), ("floor", row.floor), ("points", row.difference))
    cells = []
    for what, figure in figures:
        if figure.value is None or figure.interval is None:
            lacking = what if figure.value is None else f"interval of the {what}"
            notes[f"{NO_VALUE}: {lacking}: {figure.why_not}"] = None
        cells += _cells(figure, signed=what == "points")
    return (row.name.capitalize() if row.name == "overall" else row.name,
            f"{row.n_identical} of {row.n_compared}", *cells)  # fmt: skip


def _cells(figure: Figure, signed: bool) -> list[str]:
    def shown(value: float) -> str:
        points = round(100 * value, 1) + 0.0  # never -0.0
        return f"{points:+.1f}" if signed else f"{points:.1f} %"

    bounds = figure.interval
    between = " to " if signed else "-"
    return [
        NO_VALUE if figure.value is None else shown(figure.value),
        NO_VALUE if bounds is None else f"{shown(bounds[0])}{between}{shown(bounds[1])}",
    ]


def _positions(found: Sequence[tuple[str, Greedy]]) -> Iterator[Block]:
    """Where outputs part: one line for each arm, and one for the baseline's own runs."""
    lines = [(label, one.positions) for label, one in found]
    lines.append((FLOOR, found[0][1].floor_positions))
    yield Table(
        (Column("First difference at token", words=True), Column("Differ"), Column("First"),
         *(Column(f"P{q}") for q in (25, 50, 75))),
        tuple(_position_row(label, one) for label, one in lines),
        tuple(f"{NO_VALUE}: {label}: {one.why_not}" for label, one in lines if one.why_not),
    )  # fmt: skip
    drawn = [(label, one) for label, one in lines if one.at]
    if not drawn:
        return
    told = "; ".join(
        f"{label}: {one.n_diverged} of {one.n_compared} differ" for label, one in drawn
    )
    longest = max(one.at[-1] for _, one in drawn)
    yield Chart(
        "first-divergence",
        "Outputs still identical, by token",
        f"Share of outputs that are identical up to a token. {told}.",
        Axis("Output tokens so far", "tokens", low=0.0),
        Axis("Identical so far", "% of comparisons", low=0.0, high=100.0),
        tuple(
            Series(
                label,
                "step",
                (0.0, *map(float, one.at), float(longest)),
                (100.0, *(100 * s for s in one.share), 100 * one.share[-1]),
            )
            for label, one in drawn
        ),
        _curve_table(drawn, longest),
    )


def _curve_table(drawn: Sequence[tuple[str, Divergence]], longest: int) -> Table:
    """Every corner of the curves: after how many tokens which share is still identical."""
    tokens = sorted({0, longest, *(at for _, one in drawn for at in one.at)})
    return Table(
        (
            Column("Output tokens so far"),
            *(Column(f"{label} (%)", term="identical_share") for label, _ in drawn),
        ),
        tuple(
            (str(token), *(f"{100 * _still(one, token):.2f}" for _, one in drawn))
            for token in tokens
        ),
    )


def _still(one: Divergence, token: int) -> float:
    """Share identical after so many tokens."""
    return next((s for at, s in zip(one.at[::-1], one.share[::-1], strict=True) if at <= token), 1)


def _position_row(label: str, one: Divergence) -> tuple[str, ...]:
    known = f"{one.n_diverged} of {one.n_compared}" if one.n_compared else NO_VALUE
    first = NO_VALUE if one.first is None else str(one.first)
    return (
        label,
        known,
        first,
        *(f"{one.quantiles[q]:.0f}" if q in one.quantiles else NO_VALUE for q in (25, 50, 75)),
    )


# ---------------------------------------------------------------- temperature > 0


def _tests(found: Sampled) -> Table:
    notes: dict[str, None] = {}
    rows = [(row.name, row) for row in found.by_category]
    if found.check is not None:
        rows.append(("baseline against itself", found.check))
    rows.append(("Overall", found.overall))
    cells = tuple(_test_row(name, row, notes) for name, row in rows)
    if found.check is None:
        notes[
            f"the test itself is not checked on baseline against baseline: {found.why_no_check}"
        ] = None
    if found.n_left_out:
        notes[
            f"{found.n_left_out} conversation(s) are left out: not answered in every run after the "
            "same first prompt"
        ] = None
    headers = ("Conversations", "Unchanged", "Tokens: p", "adjusted", "Lengths: p", "adjusted")
    return Table(
        (Column("Category", words=True), *(Column(header) for header in headers)),
        cells,
        tuple(notes),
        total=True,
    )


def _test_row(name: str, row: TwoSample, notes: dict[str, None]) -> tuple[str, ...]:
    cells = []
    for what, one in (("tokens", row.tokens), ("lengths", row.lengths)):
        if one.value is None:
            notes[f"{NO_VALUE}: {what}: {one.why_not}"] = None
        elif not one.exact:
            notes[f"p from {one.n_permutations} random permutations where they are too many to "
                  "count them all"] = None  # fmt: skip
        cells += [_p(one.value), _p(one.adjusted)]
    return (name, str(row.n_conversations), str(row.n_unchanged), *cells)


def _p(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.4f}"
