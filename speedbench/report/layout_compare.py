"""Layout of a comparison: how much faster each arm is, how sure that is, and whence it comes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Literal

from speedbench.report import layout
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
from speedbench.report.compare import (
    ArmComparison,
    CategoryComparison,
    Comparison,
    overall_speedup,
    significant,
)
from speedbench.report.layout import NO_VALUE, NOT_SIGNIFICANT, Cells, interval, number, sentence
from speedbench.report.sample import Sample
from speedbench.report.summary import Figure

TITLE = "speedbench: comparison"
REPEATED = (
    "the interval of the overall speedup holds the spread between runs, too; those of categories "
    "are of conversations alone"
)
LEGEND = f"{NOT_SIGNIFICANT}: not significant, the 95 % interval contains 1"
INTERVALS = "95 % interval"

ONE_ROUND = (
    "the intervals say how much depends on the choice of conversations. How much the next run of "
    "the same arms would differ is not in them: repeat both arms (--repeat), on a quiet machine, "
    "before claiming a speedup."
)
RESIDUAL = (
    "Residual: user TPS over predicted. It holds what tells tokens per step as they look from the "
    "acceptance length: last steps that show fewer tokens than were accepted, and that a "
    "conversation counts once in a speedup, but as often as it has steps in an AL."
)
OVER_THESE = (
    "AL: over the conversations of this table alone; of all conversations of an arm it may differ"
)
MEANS = (
    "Overall: an AL is the mean over categories, a ratio the geometric mean; so the overall AL "
    "ratio is not the ratio of the overall ALs"
)


def of_comparison(comparison: Comparison) -> Iterator[Block]:
    """Checks, the arms beside each other where there are several, and then each of them."""
    arms = comparison.arms
    yield Heading(TITLE, 1)
    yield Facts(
        (
            ("base", _named(comparison.base), "plain"),
            *((_arm_word(arms), _named(a.arm), "plain") for a in arms),
        )
    )
    samples = (comparison.base, *(one.arm for one in arms))
    if any(one.manifest["engine"].get("simulated") for one in samples):
        yield Paragraph(layout.NOT_A_MEASUREMENT, "error")
    groups = [("base", comparison.checks)]
    groups += [(a.arm.label if len(arms) > 1 else "arm", a.checks) for a in arms]
    yield from layout.checks(groups)
    if len(arms) > 1:
        yield Heading("Arms")
        yield from of_arms([comparison])
    for i, one in enumerate(arms, 1):
        yield from _of_arm(one, comparison, f"arm-{i}-" if len(arms) > 1 else "")


def of_arms(comparisons: Sequence[Comparison]) -> Iterator[Block]:
    """Arms of one or several comparisons beside each other, each over its own base."""
    arms = [one for comparison in comparisons for one in comparison.arms]
    notes = []
    if len(comparisons) > 1:
        notes = [
            f"the base of {layout.listed([one.arm.label for one in comparison.arms])}: "
            f"{comparison.base.label}"
            for comparison in comparisons
        ]
    yield _arms_table(arms, notes)
    yield _arms_chart(arms)


def _arm_word(arms: Sequence[ArmComparison]) -> str:
    return "arm" if len(arms) == 1 else "arms"


def _named(one: Sample) -> str:
    """What it is, and the runs it is made of."""
    places = [PurePath(run.source) for run in one.runs]
    folders = {place.parent for place in places}
    if len(places) == 1:
        return f"{one.label} ({places[0]})"
    if len(folders) == 1:
        names = layout.listed([place.name for place in places])
        return f"{one.label}, {len(places)} runs ({folders.pop()}: {names})"
    return f"{one.label}, {len(places)} runs ({layout.listed([str(place) for place in places])})"


def _of_arm(one: ArmComparison, comparison: Comparison, prefix: str) -> Iterator[Block]:
    yield Heading(f"Speedup of {one.arm.label} over the base")
    yield _headline(one)
    yield _speedup_table(one, comparison.base.is_baseline)
    yield _speedup_chart(one, prefix)
    yield Heading("Where it comes from", 3)
    yield Paragraph(_traced(one.overall))
    yield _parts_table(one)
    yield _predicted_table(one)
    yield _parts_chart(one, prefix)
    if one.whereabouts:
        yield from _served(one)


def _served(one: ArmComparison) -> Iterator[Block]:
    """Where the time between an embedded and a served run is spent."""
    yield Heading("Where embedded and served part", 3)
    rows = []
    for part in one.whereabouts:
        told = (part.base, part.arm, part.difference)
        bounds = part.difference.interval
        rows.append(
            (
                part.part,
                *(NO_VALUE if f.value is None else number(f.value) for f in told),
                NO_VALUE if bounds is None else interval(bounds),
            )
        )
    headers = ("Base", "Arm", "Difference", INTERVALS)
    yield Table(
        (Column("Seconds of a conversation", words=True), *map(Column, headers)),
        tuple(rows),
        total=True,
    )
    yield Paragraph(
        "Of the time until the first tokens, the client's own, from submitting to sending: "
        f"{sentence(one.client, 's')}. What else a server adds there is the network and its front "
        "end; after the first tokens it is the engine's steps, and how soon they reach the client."
    )


# ---------------------------------------------------------------- in words


def _headline(one: ArmComparison) -> Facts:
    items: list[tuple[str, str, Literal["plain"]]] = [
        ("User TPS", _user_tps(one), "plain"),
        ("Output TPS", _output_tps(one), "plain"),
        ("TTFT", _ttft(one), "plain"),
        ("Between runs", _between(one), "plain"),
    ]
    if (least := one.detectable.value) is not None:
        items.append(
            (
                "Detectable",
                f"a change of user TPS of {100 * least:.2f} % is the least that such a comparison "
                "finds with 80 % power at the 5 % level"
                + ("" if one.between.n_rounds > 1 else ", if runs do not differ"),
                "plain",
            )
        )
    return Facts(tuple(items))


def _verdict(ratio: Figure) -> str:
    """What is added to a ratio in running text."""
    if ratio.value is None:
        return ""
    if ratio.interval is None:
        return f", without an interval: {ratio.why_not}"
    if significant(ratio) is False:
        return ", NOT SIGNIFICANT: the interval contains 1"
    return ""


def _speedup(one: ArmComparison, row: CategoryComparison) -> Figure:
    return overall_speedup(one) if row is one.overall else row.user_tps


def _user_tps(one: ArmComparison) -> str:
    ratio, row = overall_speedup(one), one.overall
    if ratio.value is None:
        return f"{sentence(ratio)}."
    over = (
        f"{row.n_pairs} paired conversations"
        if one.paired
        else f"{row.n_base} conversations of the base and {row.n} of the arm, not paired"
    )
    n_categories = sum(category.user_tps.value is not None for category in one.by_category)
    means = f", within and then over {n_categories} categories" if n_categories > 1 else ""
    text = f"{sentence(ratio)} times the base's{_verdict(ratio)}. Geometric mean over {over}{means}"
    if left_out := sum(one.n_left_out.values()):
        text += f"; {left_out} conversations are left out"
    return f"{text}."


def _output_tps(one: ArmComparison) -> str:
    ratio = one.output_tps
    if ratio.value is None:
        return f"{sentence(ratio)}."
    return f"{sentence(ratio)} times the base's, while all slots were filled{_verdict(ratio)}."


def _ttft(one: ArmComparison) -> str:
    repeated = one.between_ttft.total
    ratio = one.overall.ttft if repeated.interval is None else repeated
    if ratio.value is None:
        return f"{sentence(ratio)}."
    return f"{sentence(ratio)} times the base's{_verdict(ratio)}. Less is faster."


def _between(one: ArmComparison) -> str:
    found = one.between
    if found.n_rounds < 2 or found.sd.value is None or found.sd.interval is None:
        return ONE_ROUND
    rounds = ", ".join(number(value) for value in found.by_round)
    low, high = found.sd.interval
    text = (
        f"user TPS {rounds} times the base's in {found.n_rounds} rounds: standard deviation "
        f"{100 * found.sd.value:.2f} % (95 % {100 * low:.2f}-{100 * high:.2f} %)"
    )
    return (
        f"{text}. The interval of the speedup holds this spread and that of conversations; of "
        f"conversations alone it would be {sentence(one.overall.user_tps)}."
    )


def _traced(row: CategoryComparison) -> str:
    """One sentence from acceptance and step time to the speedup."""
    if row.predicted.value is None:
        return f"Acceptance and step time cannot be put together: {row.predicted.why_not}."
    al, step, tps = row.al_ratio.value, row.step_time.value, row.user_tps.value
    assert al is not None
    assert step is not None
    assert tps is not None
    return (
        f"A decode step yields {al:.3f} times the tokens of the base's (AL ratio) and takes "
        f"{step:.3f} times as long (step-time ratio): {row.predicted.value:.3f} times the user TPS "
        f"is predicted, {tps:.3f} times was measured. {RESIDUAL}"
    )


# ---------------------------------------------------------------- tables


def _rows(one: ArmComparison) -> tuple[CategoryComparison, ...]:
    """Categories, and overall; of arms that were asked different prompts, those that both have."""
    known = [row for row in one.by_category if one.paired or (row.n_base and row.n)]
    return (*known, one.overall)


def _marked(text: str, ratio: Figure) -> str:
    return f"{text} {NOT_SIGNIFICANT}" if significant(ratio) is False else text


class _Ratios(Cells):
    """Cells that mark what is not significant."""

    def __init__(self) -> None:
        super().__init__()
        self._marked = False

    def ratio(self, where: str, figure: Figure) -> tuple[str, str]:
        """Value and interval."""
        self._marked |= significant(figure) is False
        return _marked(self.value(where, figure), figure), self.interval(where, figure)

    def notes(self) -> tuple[str, ...]:
        return (*super().notes(), *([LEGEND] if self._marked else ()))


def _n(row: CategoryComparison, paired: bool) -> str:
    return str(row.n_pairs) if paired else f"{row.n_base}/{row.n}"


def _speedup_table(one: ArmComparison, over_baseline: bool) -> Table:
    """The acceptance length and what came of it; of a base that drafts, its length, too."""
    cells = _Ratios()

    def length(row: CategoryComparison) -> tuple[str, ...]:
        where = f"AL of {row.name}"
        if over_baseline:
            return cells.value(where, row.al), cells.interval(where, row.al)
        return (
            cells.value(f"{where} in the base", row.al_base),
            cells.value(where, row.al),
            *cells.ratio(f"AL ratio of {row.name}", row.al_ratio),
        )

    rows = tuple(
        (
            row.name,
            _n(row, one.paired),
            *length(row),
            *cells.ratio(f"speedup of {row.name}", _speedup(one, row)),
        )
        for row in _rows(one)
    )
    lengths = (
        (Column("AL"), Column(INTERVALS))
        if over_baseline
        else (Column("AL\nbase"), Column("AL"), Column("AL\nratio"), Column(INTERVALS))
    )
    count = Column("Pairs" if one.paired else "Base/\narm", term="count")
    columns = (
        Column("Category", words=True),
        count,
        *lengths,
        Column("Speedup"),
        Column(INTERVALS),
    )
    notes = (
        *cells.notes(),
        MEANS,
        OVER_THESE,
        *([REPEATED] if overall_speedup(one) is one.between.total else ()),
    )
    return Table(columns, rows, notes, total=True)


def _parts_table(one: ArmComparison) -> Table:
    cells = _Ratios()
    return Table(
        (
            Column("Category", words=True),
            Column("AL\nratio"),
            Column(INTERVALS),
            Column("Step-time\nratio"),
            Column(INTERVALS),
        ),
        tuple(
            (
                row.name,
                *cells.ratio(f"AL ratio of {row.name}", row.al_ratio),
                *cells.ratio(f"step-time ratio of {row.name}", row.step_time),
            )
            for row in _rows(one)
        ),
        cells.notes(),
        total=True,
    )


def _predicted_table(one: ArmComparison) -> Table:
    cells = _Ratios()
    return Table(
        (
            Column("Category", words=True),
            Column("Predicted"),
            Column(INTERVALS),
            Column("Residual"),
            Column(INTERVALS),
        ),
        tuple(
            (
                row.name,
                *cells.ratio(f"predicted speedup of {row.name}", row.predicted),
                cells.value(f"residual of {row.name}", row.residual),
                cells.interval(f"residual of {row.name}", row.residual),
            )
            for row in _rows(one)
        ),
        cells.notes(),
        total=True,
    )


def _arms_table(arms: Sequence[ArmComparison], notes: Sequence[str] = ()) -> Table:
    """Overall figures of every arm."""
    cells = _Ratios()
    rows = []
    for one in arms:
        label, row = one.arm.label, one.overall
        rows.append(
            (
                label,
                cells.value(f"AL of {label}", row.al),
                *cells.ratio(f"speedup of {label}", overall_speedup(one)),
                *cells.ratio(f"step-time ratio of {label}", row.step_time),
                *cells.ratio(f"output-TPS ratio of {label}", one.output_tps),
            )
        )
    return Table(
        (
            Column("Arm", words=True),
            Column("AL"),
            Column("Speedup"),
            Column(INTERVALS),
            Column("Step-time\nratio"),
            Column(INTERVALS),
            Column("Output-TPS\nratio"),
            Column(INTERVALS),
        ),
        tuple(rows),
        (*cells.notes(), *notes),
    )


# ---------------------------------------------------------------- figures

NAN = math.nan


def _series(label: str, figures: Sequence[Figure], offset: float = 0.0) -> Series:
    """Points at places 0, 1, ..., each with its interval."""
    values = tuple(NAN if f.value is None else f.value for f in figures)
    bounds = [f.interval or (v, v) for f, v in zip(figures, values, strict=True)]
    return Series(
        label,
        "point",
        tuple(i + offset for i in range(len(figures))),
        values,
        tuple(low for low, _ in bounds),
        tuple(high for _, high in bounds),
    )


def _cells(figure: Figure) -> tuple[str, str]:
    value = NO_VALUE if figure.value is None else _marked(number(figure.value), figure)
    return value, NO_VALUE if figure.interval is None else interval(figure.interval)


def _speedup_chart(one: ArmComparison, prefix: str) -> Chart:
    rows = _rows(one)
    figures = [_speedup(one, row) for row in rows]
    known = [row for row in one.by_category if row.user_tps.value is not None]
    extremes = ""
    if len(known) > 1:
        worst, best = (of(known, key=lambda row: row.user_tps.value or 0.0) for of in (min, max))
        extremes = (
            f", from {_told(worst.user_tps)} ({worst.name}) to {_told(best.user_tps)} ({best.name})"
        )
    return Chart(
        f"{prefix}speedup-by-category",
        f"Speedup by category: {one.arm.label}",
        f"User TPS of {one.arm.label} over the base's: overall {_told(overall_speedup(one))}"
        f"{extremes}; 1 is no difference.",
        Axis("Category", ticks=tuple(row.name for row in rows)),
        Axis("User-TPS speedup with 95 % intervals", "times the base"),
        (_series("user TPS", figures),),
        Table(
            (Column("Category", words=True), Column("Speedup"), Column(INTERVALS)),
            tuple((row.name, *_cells(f)) for row, f in zip(rows, figures, strict=True)),
            total=True,
        ),
        reference=1.0,
        horizontal=True,
        repeated=True,
    )


def _told(figure: Figure) -> str:
    return NO_VALUE if figure.value is None else f"{figure.value:.3f}"


def _parts_chart(one: ArmComparison, prefix: str) -> Chart:
    rows = _rows(one)
    named = {
        "AL ratio": [row.al_ratio for row in rows],
        "step-time ratio": [row.step_time for row in rows],
        "predicted speedup": [row.predicted for row in rows],
        "speedup": [row.user_tps for row in rows],
    }
    total = one.overall
    return Chart(
        f"{prefix}decomposition",
        f"Where the speedup comes from: {one.arm.label}",
        f"Overall: AL ratio {_told(total.al_ratio)} over step-time ratio "
        f"{_told(total.step_time)} predicts {_told(total.predicted)}; measured "
        f"{_told(total.user_tps)}.",
        Axis("Category", ticks=tuple(row.name for row in rows)),
        Axis("Ratio with 95 % intervals", "times the base"),
        tuple(_series(label, figures) for label, figures in named.items()),
        Table(
            (
                Column("Category", words=True),
                *(
                    column
                    for label in named
                    for column in (Column(label.capitalize()), Column(INTERVALS))
                ),
            ),
            tuple(
                (row.name, *(cell for figures in named.values() for cell in _cells(figures[i])))
                for i, row in enumerate(rows)
            ),
            total=True,
        ),
        reference=1.0,
        horizontal=True,
        repeated=True,
    )


def _arms_chart(arms: Sequence[ArmComparison]) -> Chart:
    figures = [overall_speedup(one) for one in arms]
    labels = tuple(one.arm.label for one in arms)
    told = "; ".join(f"{label} {_told(f)}" for label, f in zip(labels, figures, strict=True))
    return Chart(
        "speedup-by-arm",
        "Speedup by arm",
        f"User TPS over the base's, overall: {told}; 1 is no difference.",
        Axis("Arm", ticks=labels),
        Axis("User-TPS speedup with 95 % intervals", "times the base"),
        (_series("user TPS", figures),),
        Table(
            (Column("Arm", words=True), Column("Speedup"), Column(INTERVALS)),
            tuple((label, *_cells(f)) for label, f in zip(labels, figures, strict=True)),
        ),
        reference=1.0,
        horizontal=True,
        repeated=True,
    )
