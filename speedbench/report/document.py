"""Document: the whole report of one arm or of several, as blocks that every form draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from speedbench.checks import Check
from speedbench.lossless import Losslessness, losslessness
from speedbench.report import (
    layout,
    layout_charts,
    layout_compare,
    layout_lossless,
    layout_matrix,
    layout_pareto,
    sample,
)
from speedbench.report.arms import Arm, unlike
from speedbench.report.blocks import Block, Column, Facts, Heading, Paragraph, Section, Table
from speedbench.report.compare import ArmComparison, Comparison
from speedbench.report.compared import Compared, compared
from speedbench.report.matrix import Matrix, MatrixRow
from speedbench.report.sample import Sample
from speedbench.report.summary import (
    Figure,
    Resamples,
    Summary,
    summarize,
    summarize_repeats,
    why_no_time,
)
from speedbench.types import UserError

MANY_ARMS = 3
"""More arms than this are compared in parts that a page folds away."""

OF_ALL = (
    "AL: over all conversations of an arm that did not fail; beside a speedup it is of the paired "
    "ones"
)
BY_CATEGORY = "tokens per decode step; Overall: the mean over the categories, n/a if one is"


@dataclass(frozen=True, slots=True)
class Told:
    """An arm with the summary of each of its runs, and of all of them together."""

    arm: Arm
    runs: tuple[Summary, ...]
    whole: Summary


def told(arm: Arm, resamples: Resamples | None = None) -> Told:
    """`resamples`: shared by the arms of one report."""
    shared = resamples or Resamples()
    runs = tuple(summarize(run, shared) for run in arm.runs)
    return Told(arm, runs, summarize_repeats(arm.runs, runs, shared))


def document(arms: Sequence[Arm], insights: Iterable[Block] = ()) -> Iterator[Block]:
    """The report of these arms. Every arm that drafts is held against the baseline that differs
    from it in speculation alone; where there is none, why is told.

    insights  what else is known of the arms: it stands before the details of each
    """
    if not arms:
        raise UserError("there is no run to report: name a run directory")
    if len(arms) == 1 and len(arms[0].runs) == 1:
        yield from layout.of_run(summarize(arms[0].runs[0]))
        yield from insights
        return
    resamples = Resamples()
    each = [told(arm, resamples) for arm in arms]
    found = compared(arms) if len(arms) > 1 else Compared((), {})
    yield from _top(each, found)
    if len(each) > 1:
        yield from _speedups(found)
        yield from layout_pareto.of_sweep(arms, _samples(arms, found))
        yield from _same_outputs(found)
        yield from _overview(each)
    yield from insights
    for i, one in enumerate(each, 1):
        inside = tuple(_details(one, f"arm-{i}-"))
        yield Section(f"Details: {one.arm.label}", inside, long=len(each) > 2)


# ---------------------------------------------------------------- above all numbers


def _top(each: Sequence[Told], found: Compared) -> Iterator[Block]:
    n_runs = sum(len(one.runs) for one in each)
    arms = "1 arm" if len(each) == 1 else f"{len(each)} arms"
    yield Heading(f"speedbench: {arms}, {n_runs} runs", 1)
    if any(one.arm.manifest["engine"].get("simulated") for one in each):
        yield Paragraph(layout.NOT_A_MEASUREMENT, "error")
    yield from _what_ran(each)
    together = {
        "every arm": [one.arm.label for one in each],
        "every arm against its baseline": [
            _against(comparison, pair) for comparison in found.comparisons
            for pair in comparison.arms
        ],
    }  # fmt: skip
    yield from layout.checks(list(_doubts(each, found)), together)
    yield layout.provenance(
        {name: run for one in each for name, run in _named(one)},
    )
    if len(each) > MANY_ARMS:
        recorded = Facts(tuple((one.arm.label, _recorded(one), "plain") for one in each))
        yield Section("What was recorded, arm by arm", (recorded,), long=True)


def _what_ran(each: Sequence[Told]) -> Iterator[Block]:
    """Of each arm; of many, what they share, and those of which something is missing."""
    if len(each) <= MANY_ARMS:
        yield Facts(tuple((one.arm.label, _recorded(one), "plain") for one in each))
        return
    first, *others = (layout.title_parts(one.whole) for one in each)
    shared = [part for part in first if all(part in other for other in others)]
    if shared:
        yield Paragraph(f"In every arm: {', '.join(shared)}.")
    lacking = [o for o in each if o.whole.n_failed or o.whole.manifest["status"] != "complete"]
    if lacking:
        yield Facts(tuple((one.arm.label, _recorded(one), "warning") for one in lacking))


def _recorded(one: Told) -> str:
    """What was recorded of an arm; its title, too, where a label does not say it all."""
    runs = f" in {len(one.runs)} runs" if len(one.runs) > 1 else ""
    return f"{layout.title(one.whole)}{runs}. {layout.totals(one.whole)}"


def _named(one: Told) -> Iterator[tuple[str, Summary]]:
    """Runs by what tells them apart in the whole report."""
    for i, run in enumerate(one.runs, 1):
        yield one.arm.label + (f", run {i}" if len(one.runs) > 1 else ""), run


def _doubts(each: Sequence[Told], found: Compared) -> Iterator[tuple[str, Sequence[Check]]]:
    """Checks by whose they are: of an arm whose runs all say it, of one of its runs, of a pair."""
    own: set[Check] = set()
    for one in each:
        own.update(one.whole.checks)
        common = set(one.runs[0].checks).intersection(*(run.checks for run in one.runs))
        own.update(unlike(one.arm))
        shared = [check for check in one.runs[0].checks if check in common]
        yield one.arm.label, [*shared, *unlike(one.arm)]
        for name, run in _named(one):
            yield name, [check for check in run.checks if check not in common]
    for comparison in found.comparisons:
        for pair in comparison.arms:
            own_checks = [check for check in pair.checks if check not in own]
            yield _against(comparison, pair), own_checks


def _against(comparison: Comparison, pair: ArmComparison) -> str:
    return f"{pair.arm.label} against {comparison.base.label}"


# ---------------------------------------------------------------- arms beside each other


def _overview(each: Sequence[Told]) -> Iterator[Block]:
    yield Heading("Arms")
    cells = layout.Cells()
    rows = []
    for one in each:
        label, whole = one.arm.label, one.whole
        al = whole.lengths["al"]
        rows.append(
            (
                label,
                str(len(one.runs)),
                str(whole.n_conversations),
                cells.value(label, al) if whole.draft_length else "1 (nothing drafted)",
                cells.interval(label, al) if whole.draft_length else "",
            )
        )
    headers = ("Runs", "Conversations", "AL", "95 % interval")
    yield Table(
        (Column("Arm", words=True), *(Column(h) for h in headers)),
        tuple(rows),
        (*cells.notes(), OF_ALL),
    )
    yield from layout_charts.of_arms({one.arm.label: one.whole for one in each})
    yield from _by_category(each)


def _samples(arms: Sequence[Arm], found: Compared) -> list[Sample]:
    """The arms as comparisons see them: those already made, and the others."""
    made = {
        one.label: one
        for comparison in found.comparisons
        for one in (comparison.base, *(pair.arm for pair in comparison.arms))
    }
    return [made.get(arm.label) or sample.of_arm(arm) for arm in arms]


def _speedups(found: Compared) -> Iterator[Block]:
    """What each comparison shows: all arms beside each other, and then each of them."""
    for label, why in found.not_compared.items():
        yield Paragraph(f"{label} is held against no baseline: {why}.", "warning")
    n_arms = sum(len(comparison.arms) for comparison in found.comparisons)
    if n_arms > 1:
        yield Heading("Speedup")
        yield from layout_compare.of_arms(found.comparisons)
    each = [
        part
        for comparison in found.comparisons
        for part in _parts(layout_compare.of_comparison(comparison))
        if part[0].text != "Arms"
    ]
    if n_arms > MANY_ARMS:
        folded = tuple(Section(head.text, tuple(blocks), in_place=True) for head, blocks in each)
        yield Section("Speedup by category, arm by arm", folded, in_place=True, long=True)
        return
    for heading, blocks in each:
        yield heading
        yield from blocks


def _parts(blocks: Iterable[Block]) -> Iterator[tuple[Heading, list[Block]]]:
    """A report's sections; what stands above the first one is on top of this report already."""
    parts: list[tuple[Heading, list[Block]]] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            parts.append((block, []))
        elif parts:
            parts[-1][1].append(block)
    yield from parts


def _same_outputs(found: Compared) -> Iterator[Block]:
    """The verdict on every arm, and then the numbers, folded away where arms are many."""
    each = [
        (comparison, [(one.arm.label, _losslessness(comparison, one)) for one in comparison.arms])
        for comparison in found.comparisons
    ]
    if not each:
        return
    yield Heading(layout_lossless.TITLE)
    n_arms = sum(len(outputs) for _, outputs in each)
    yield from layout_lossless.verdicts([one for _, outputs in each for one in outputs])
    numbers: list[Block] = []
    for comparison, outputs in each:
        if len(each) > 1:
            numbers.append(Heading(f"Against {comparison.base.label}", 3))
        numbers += layout_lossless.numbers(outputs)
    if n_arms > MANY_ARMS:
        yield Section("Losslessness in numbers", tuple(numbers), in_place=True, long=True)
    else:
        yield from numbers


def _losslessness(comparison: Comparison, one: ArmComparison) -> Losslessness:
    base = comparison.base
    temperature = max(float(side.manifest["config"]["temperature"]) for side in (base, one.arm))
    return losslessness(
        [run.answers for run in base.runs], [run.answers for run in one.arm.runs], temperature
    )


def _by_category(each: Sequence[Told]) -> Iterator[Block]:
    """Acceptance lengths of all arms side by side, a line for each."""
    rows = tuple(
        MatrixRow(
            one.arm.label,
            {row.name: row.lengths["al"] for row in one.whole.categories},
            one.whole.lengths["al"],
        )
        for one in each
        if one.whole.draft_length
    )
    names = sorted({name for row in rows for name in row.cells})
    if not rows:
        return
    title = "Acceptance length by arm and category"
    made = layout_matrix.table(Matrix("accept_length", tuple(names), rows))
    # Each arm's details hold them, too, where a terminal has room for them.
    made = replace(
        made,
        columns=(Column("Arm", words=True), *made.columns[1:]),
        notes=(BY_CATEGORY, *made.notes[1:]),
        repeated=True,
    )
    if len(rows) > MANY_ARMS:
        yield Section(title, (made,), in_place=True, long=True)
    else:
        yield replace(made, caption=title)


# ---------------------------------------------------------------- one arm


def _details(one: Told, prefix: str) -> Iterator[Block]:
    if len(one.runs) == 1:
        yield from layout.acceptance(one.whole, prefix)
        yield from layout.timing(one.whole, prefix)
        return
    yield Paragraph(
        f"Acceptance is pooled over {len(one.runs)} runs: a conversation's steps of all of them "
        "are added up, so that it stays one unit of resampling. Times are told run by run."
    )
    yield from layout.acceptance(one.whole, prefix)
    yield Heading("Timing, run by run")
    yield by_run(one.runs)
    runs = {f"run {i}": run for i, run in enumerate(one.runs, 1)}
    yield from layout_charts.of_repeats(runs, prefix)
    for i, run in enumerate(one.runs, 1):
        inside = tuple(
            block
            for block in layout.timing(run, f"{prefix}run-{i}-")
            if not isinstance(block, Heading)
        )
        yield Section(f"Timing of run {i}", inside, in_place=True)


RUN_TIMES: Mapping[str, tuple[str, float, str]] = {
    "TTFT P50 (ms)": ("ttft_s", 1e3, "p50"),
    "TTFT P95 (ms)": ("ttft_s", 1e3, "p95"),
    "Step time P50 (ms)": ("step_time_s", 1e3, "p50"),
    "Step time P95 (ms)": ("step_time_s", 1e3, "p95"),
    "User TPS P50 (tokens/s)": ("user_tps", 1, "p50"),
}
"""Row -> which of a summary's times, factor from its unit, statistic."""


def by_run(runs: Sequence[Summary]) -> Table:
    """The main times of every repeat, a column for each, and its acceptance length by itself."""
    cells = layout.Cells()
    names = [f"run {i}" for i in range(1, len(runs) + 1)]

    def row(label: str, figures: Iterable[Figure]) -> tuple[str, ...]:
        return (
            label,
            *(cells.value(f"{label}, {name}", f) for name, f in zip(names, figures, strict=True)),
        )

    rows = [row("AL", (run.lengths["al"] for run in runs))] if runs[0].draft_length else []
    rows.append(row("Output TPS (tokens/s)", (run.output_tps for run in runs)))
    rows.append(row("Output TPS, steady (tokens/s)", (run.output_tps_steady for run in runs)))
    for label, (key, factor, statistic) in RUN_TIMES.items():
        rows.append(row(label, (_time(run, key, factor, statistic) for run in runs)))
    columns = (Column("", words=True), *(Column(name, term="run") for name in names))
    return Table(columns, tuple(rows), cells.notes())


def _time(run: Summary, key: str, factor: float, statistic: str) -> Figure:
    found = (run.timing[key] or {}).get(statistic)
    if found is None:
        return Figure(None, why_not=why_no_time(run.manifest, key))
    return Figure(found * factor)
