"""Layout of a sweep: its cells, the Pareto figure, the best K at each load, where drafting pays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from speedbench.report.arms import Arm
from speedbench.report.blocks import (
    Axis,
    Block,
    Chart,
    Column,
    Facts,
    Heading,
    Paragraph,
    Series,
    Style,
    Table,
)
from speedbench.report.break_even import BreakEven, Speedup
from speedbench.report.compare import significant
from speedbench.report.layout import NO_VALUE, NOT_SIGNIFICANT, Cells
from speedbench.report.pareto import Best, Frontier, Pareto, Point, is_sweep, pareto
from speedbench.report.sample import Sample
from speedbench.report.summary import Figure

TITLE = "Load and draft length"
NAN = math.nan


def of_sweep(arms: Sequence[Arm], samples: Sequence[Sample] = ()) -> Iterator[Block]:
    """What a sweep shows; nothing where there are not two concurrencies or draft lengths.

    `samples`: of the arms, in their order, where they were made already.
    """
    if is_sweep(arms):
        yield from of_pareto(pareto(arms, samples))


def of_pareto(found: Pareto) -> Iterator[Block]:
    yield Heading(TITLE)
    yield Paragraph(_what_is_shown(found))
    cells = _cell_table(found)
    yield cells
    settings = list(dict.fromkeys(point.setting for point in found.points))
    for number_, setting in enumerate(settings, 1):
        suffix = "" if len(settings) == 1 else f"-{number_}"
        yield _chart(found, setting, cells, suffix)
    if found.speedups:
        yield _speedups_table(found)
    for number_, setting in enumerate(settings, 1):
        suffix = "" if len(settings) == 1 else f"-{number_}"
        yield from _speedup_chart(found, setting, suffix)
    if found.best:
        yield Heading("Best draft length at each concurrency", 3)
        yield _best_table(found.best)
    if found.break_even:
        yield Heading("Where speculation stops paying", 3)
        facts = _break_even_facts(found)
        yield facts
        if any(NO_INTERVAL in text for _, text, _ in facts.items):
            yield Paragraph(WITHOUT_INTERVAL, "note")
    for note in found.notes:
        yield Paragraph(note, "note")


def _what_is_shown(found: Pareto) -> str:
    per_gpu = "per GPU" if found.per_gpu else f"not per GPU, because {found.why_no_gpu}"
    span = "while all slots were filled"
    if not found.is_steady:
        span = f"over whole runs, because {found.why_whole}"
    return (
        "User TPS is the mean over conversations of what each saw. Output TPS is of all of them "
        f"together, {per_gpu}. It is told {span}. Intervals hold the choice of conversations and, "
        "where runs were repeated, the spread between runs; output TPS of a single run has none."
    )


def output_name(found: Pareto) -> str:
    return "Output TPS per GPU" if found.per_gpu else "Output TPS"


def _output_unit(found: Pareto) -> str:
    return "tokens/s and GPU" if found.per_gpu else "tokens/s"


def _output_term(found: Pareto) -> str:
    if found.per_gpu:
        return "output_tps_per_gpu"
    return "output_tps_steady" if found.is_steady else "output_tps"


# ---------------------------------------------------------------- the cells


def _cell_table(found: Pareto) -> Table:
    cells = Cells()
    best = {id(p) for one in found.frontiers for p in one.points}
    rows = []
    in_order = sorted(
        found.points, key=lambda p: (p.setting, p.drafter, p.draft_length, p.concurrency)
    )
    for point in in_order:
        name = point.arm.label
        rows.append(
            (
                name,
                str(len(point.arm.runs)),
                cells.value(f"user TPS of {name}", point.user_tps),
                cells.interval(f"user TPS of {name}", point.user_tps),
                cells.value(f"output TPS of {name}", point.output_tps),
                cells.interval(f"output TPS of {name}", point.output_tps),
                "yes" if id(point) in best else "",
            )
        )
    output = f"{output_name(found)}\n({_output_unit(found)})"
    columns = (
        Column("Arm", words=True),
        Column("Runs"),
        Column("User TPS\n(tokens/s)", term="user_tps"),
        Column("95 % interval", term="interval"),
        Column(output, term=_output_term(found)),
        Column("95 % interval", term="interval"),
        Column("On the\nfrontier", term="pareto"),
    )
    return Table(columns, tuple(rows), cells.notes())


def _speedups_table(found: Pareto) -> Table:
    """Of both rates, each arm over the arm without speculation at its own concurrency."""
    cells = Cells()
    rows = []
    for s in sorted(
        found.speedups, key=lambda s: (s.setting, s.drafter, s.draft_length, s.concurrency)
    ):
        name = ", ".join(filter(None, (s.setting, f"{s.drafter} K={s.draft_length}")))
        at = f"{name} at {s.concurrency}"
        rows.append(
            (
                name,
                str(s.concurrency),
                *_ratio(cells, f"user-TPS speedup of {at}", s.user_tps),
                *_ratio(cells, f"output-TPS speedup of {at}", s.output_tps),
            )
        )
    columns = (
        Column("Arm", words=True),
        Column("Concurrency", term="concurrency"),
        Column("User-TPS\nspeedup", term="speedup"),
        Column("95 % interval", term="interval"),
        Column("Output-TPS\nspeedup", term="system_speedup"),
        Column("95 % interval", term="interval"),
    )
    caption = "Speedup over no speculation at the same concurrency"
    return Table(columns, tuple(rows), (*cells.notes(), *_ratio_notes(found)), caption=caption)


def _ratio(cells: Cells, where: str, figure: Figure) -> tuple[str, str]:
    """A ratio, marked where its interval contains 1, and the interval."""
    mark = f" {NOT_SIGNIFICANT}" if significant(figure) is False else ""
    return cells.value(where, figure) + mark, cells.interval(where, figure)


def _ratio_notes(found: Pareto) -> Iterator[str]:
    ratios = [f for s in found.speedups for f in (s.user_tps, s.output_tps)]
    if any(significant(figure) is False for figure in ratios):
        yield f"{NOT_SIGNIFICANT}: not significant, the 95 % interval contains 1"
    if any(len(point.arm.runs) > 1 for point in found.points):
        yield (
            "of repeated runs, these intervals hold the spread between runs, too: they are wider "
            "than those over conversations alone"
        )


# ---------------------------------------------------------------- figures


def _chart(found: Pareto, setting: str, table: Table, suffix: str) -> Chart:
    points = [point for point in found.points if point.setting == setting]
    kinds = dict.fromkeys((point.drafter, point.draft_length) for point in points)
    lines = [
        _frontier_series(one)
        for one in found.frontiers
        if one.setting == setting and len(one.points) > 1
    ]
    dots = [
        _dots(name, k, [p for p in points if (p.drafter, p.draft_length) == (name, k)])
        for name, k in kinds
    ]
    return Chart(
        f"pareto{suffix}",
        "Speed of one user against that of all, at each concurrency c"
        + (f": {setting}" if setting else ""),
        _alt([one for one in found.frontiers if one.setting == setting]),
        Axis("User TPS", "tokens/s", low=0.0),
        Axis(output_name(found), _output_unit(found), low=0.0),
        (*lines, *dots),
        table,
    )


def _frontier_series(one: Frontier) -> Series:
    label = "frontier with speculation" if one.speculates else "frontier without speculation"
    return Series(
        label,
        "line",
        tuple(_known(point.user_tps) for point in one.points),
        tuple(_known(point.output_tps) for point in one.points),
    )


def _dots(drafter: str, k: int, points: Sequence[Point]) -> Series:
    """One drafter's K, a point for each concurrency."""
    ordered = sorted(points, key=lambda point: point.concurrency)
    figures = [point.output_tps for point in ordered]
    return Series(
        f"{drafter} K={k}" if drafter else "baseline",
        "point",
        tuple(_known(point.user_tps) for point in ordered),
        tuple(_known(figure) for figure in figures),
        tuple(NAN if f.interval is None else f.interval[0] for f in figures),
        tuple(NAN if f.interval is None else f.interval[1] for f in figures),
        tuple(
            f"K={k}, c={point.concurrency}" if k else f"c={point.concurrency}" for point in ordered
        ),
    )


def _known(figure: Figure) -> float:
    return NAN if figure.value is None else figure.value


def _alt(frontiers: Sequence[Frontier]) -> str:
    parts = []
    for one in frontiers:
        slow, fast = one.points[0], one.points[-1]
        parts.append(
            f"{'with' if one.speculates else 'without'} speculation from "
            f"{_known(slow.output_tps):.1f} output tokens/s at {_known(slow.user_tps):.1f} per "
            f"user ({slow.arm.label}) to {_known(fast.output_tps):.1f} at "
            f"{_known(fast.user_tps):.1f} ({fast.arm.label})"
        )
    return f"The frontier goes {'; '.join(parts)}." if parts else "No arm has both numbers."


def _speedup_chart(found: Pareto, setting: str, suffix: str) -> Iterator[Chart]:
    """Output-TPS speedup over concurrency, where there are two of them."""
    mine = [s for s in found.speedups if s.setting == setting and s.output_tps.value is not None]
    loads = sorted({s.concurrency for s in mine})
    if len(loads) < 2:
        return
    kinds = list(dict.fromkeys((s.drafter, s.draft_length) for s in mine))
    series = []
    for drafter, k in kinds:
        of_kind = [s for s in mine if (s.drafter, s.draft_length) == (drafter, k)]
        ordered = sorted(of_kind, key=lambda s: s.concurrency)
        series.append(_speedup_line(f"{drafter} K={k}", ordered))
    last = loads[-1]
    told = [
        f"{s.drafter} K={s.draft_length}: {_known(s.output_tps):.3f}"
        for s in mine
        if s.concurrency == last
    ]
    yield Chart(
        f"speedup-by-load{suffix}",
        "Output-TPS speedup by concurrency" + (f": {setting}" if setting else ""),
        f"At {last} conversations at once: {', '.join(told)}.",
        Axis("Concurrency", "conversations", log=True),
        Axis("Output-TPS speedup", "ratio"),
        tuple(series),
        _speedup_table(mine),
        reference=1.0,
        repeated=True,
    )


def _speedup_line(label: str, ordered: Sequence[Speedup]) -> Series:
    figures = [s.output_tps for s in ordered]
    return Series(
        label,
        "line",
        tuple(float(s.concurrency) for s in ordered),
        tuple(_known(figure) for figure in figures),
        tuple(NAN if f.interval is None else f.interval[0] for f in figures),
        tuple(NAN if f.interval is None else f.interval[1] for f in figures),
    )


def _speedup_table(speedups: Sequence[Speedup]) -> Table:
    cells = Cells()
    rows = []
    for s in speedups:
        name = f"{s.drafter} K={s.draft_length} at {s.concurrency}"
        rows.append(
            (
                f"{s.drafter} K={s.draft_length}",
                str(s.concurrency),
                cells.value(name, s.output_tps),
                cells.interval(name, s.output_tps),
            )
        )
    columns = (
        Column("Arm", words=True),
        Column("Concurrency", term="concurrency"),
        Column("Output-TPS speedup", term="system_speedup"),
        Column("95 % interval", term="interval"),
    )
    return Table(columns, tuple(rows), cells.notes())


# ---------------------------------------------------------------- K


def _best_table(best: Sequence[Best]) -> Table:
    cells = Cells()
    settings = len({one.setting for one in best}) > 1
    rows = []
    for one in best:
        name = " ".join(filter(None, (one.setting, one.drafter)))
        at = f"{name}, {one.concurrency} at once"
        rows.append(
            (
                name if settings else one.drafter,
                str(one.concurrency),
                one.of,
                _k(one.best),
                _k(one.runner_up),
                cells.value(f"{one.of}, {at}", one.ratio),
                cells.interval(f"{one.of}, {at}", one.ratio),
                ", ".join(map(_k, one.alike)) or ("none" if one.best is not None else NO_VALUE),
                ", ".join(map(_k, one.untold)) or "none",
            )
        )
    columns = (
        Column("Arms", words=True),
        Column("Concurrency", term="concurrency"),
        Column("By", words=True),
        Column("Best K", term="draft_length"),
        Column("Next", term="runner_up"),
        Column("Next / best"),
        Column("95 % interval", term="interval"),
        Column("Not told apart\nfrom the best"),
        Column("Without an\ninterval"),
    )
    notes = (
        "K=0 is no speculation. Not told apart: the 95 % interval of the ratio to the best K "
        "contains 1; the intervals are not adjusted for how many K were compared.",
    )
    return Table(columns, tuple(rows), (*cells.notes(), *notes))


def _k(k: int | None) -> str:
    return NO_VALUE if k is None else f"K={k}"


NO_INTERVAL = "it has no interval"
WITHOUT_INTERVAL = "Without an interval, another run may say otherwise: an interval needs repeats."


def _break_even_facts(found: Pareto) -> Facts:
    speedups = {(s.setting, s.drafter, s.draft_length, s.concurrency): s for s in found.speedups}
    items: list[tuple[str, str, Style]] = []
    for one in found.break_even:
        name = " ".join(filter(None, (one.setting, f"{one.drafter} K={one.draft_length}")))
        told = {
            c: significant(speedups[one.setting, one.drafter, one.draft_length, c].output_tps)
            for c in one.measured
        }
        unsure = [str(c) for c, is_significant in told.items() if is_significant is False]
        untold = [str(c) for c, is_significant in told.items() if is_significant is None]
        items.append((name, break_even_sentence(one, unsure, untold), "plain"))
    return Facts(tuple(items))


def break_even_sentence(
    one: BreakEven, unsure: Sequence[str] = (), untold: Sequence[str] = ()
) -> str:
    """Where a K stops paying, in words. unsure: concurrencies whose speedup is not significant;
    untold: those where it has no interval, so that nobody knows."""
    if one.verdict == "unknown":
        return f"{NO_VALUE}: {one.why_not}."
    text = f"{_verdict(one)}, measured at {_listed([str(c) for c in one.measured])}."
    if unsure:
        text += f" The speedup is not significant at {_listed(unsure)}."
    if untold:
        text += f" At {_listed(untold)} {NO_INTERVAL}."
    return text


def _verdict(one: BreakEven) -> str:
    if one.verdict == "pays at all":
        return "it pays (output TPS higher than without speculation) at every concurrency"
    if one.verdict == "pays nowhere":
        return "it pays nowhere: output TPS is not higher than without speculation"
    if one.verdict == "several" or one.concurrency is None or one.between is None:
        return "its speedup crosses 1 more than once, so that there is no one break-even"
    low, high = one.between
    text = (
        f"it {one.verdict} paying at a concurrency of about {one.concurrency:.3g}, between {low} "
        f"and {high}"
    )
    if one.interval is None:
        return f"{text} (without an interval: that needs repeats)"
    first, last = one.interval
    if first is None and last is None:
        return f"{text} (95 % interval: all that was measured)"
    if first is None:
        return f"{text} (95 % interval: up to {last:.3g})"
    if last is None:
        return f"{text} (95 % interval: from {first:.3g} on)"
    return f"{text} (95 % interval: {first:.3g}-{last:.3g})"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
