"""Rows: every number of a report as one line of a table; CSV, parquet and exporters share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speedbench.lossless import Greedy, Sampled
from speedbench.report.summary import CategoryRow, Figure, Summary, why_no_time

if TYPE_CHECKING:
    from speedbench.report.compare import ArmComparison
    from speedbench.report.found import Found
    from speedbench.report.load import Load

UNITS: Mapping[str, str] = {"ttft": "s", "step_time": "s", "e2e": "s", "user_tps": "tokens/s"}
"""Of the distributions; of what is not named here, the number of output tokens: tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number, or the reason why there is none.

    arm, run    label of the arm, and the directory of the run; of a comparison no run
    base        label of the arm that a comparison holds it against; else ''
    category    '' where the number is of the whole run
    metric      its name, unique within arm, run and category
    definition  id of what it means, in `definitions.TERMS`
    low, high   95 % interval
    n           of how many steps, requests, conversations or pairs it is
    why_not     why the value, or its interval, is missing
    """

    arm: str
    run: str
    base: str
    category: str
    metric: str
    definition: str
    value: float | None
    low: float | None
    high: float | None
    n: int | None
    unit: str
    why_not: str


@dataclass(frozen=True, slots=True)
class _Place:
    """What the rows of one run, or of one category of it, have in common."""

    arm: str
    run: str
    category: str = ""
    base: str = ""

    def row(
        self,
        metric: str,
        figure: Figure,
        unit: str = "",
        *,
        definition: str = "",
        n: int | None = None,
    ) -> Row:
        low, high = figure.interval or (None, None)
        return Row(
            arm=self.arm,
            run=self.run,
            base=self.base,
            category=self.category,
            metric=metric,
            definition=definition or metric,
            value=figure.value,
            low=low,
            high=high,
            n=n,
            unit=unit,
            why_not=figure.why_not,
        )

    def count(self, metric: str, value: int, definition: str) -> Row:
        return self.row(metric, Figure(float(value)), "count", definition=definition)


def of_report(found: Found) -> Iterator[Row]:
    """The numbers of every run of every arm; of repeats together, too, without a run's name; then
    those of every arm against its baseline."""
    for one in found.told:
        for summary in one.runs:
            yield from of_run(summary, one.arm.label)
        if len(one.runs) > 1:
            here = _Place(one.arm.label, "")
            yield from _acceptance(here, one.whole)
            yield from _published(here, one.whole)
            for category in one.whole.categories:
                yield from _category(_Place(one.arm.label, "", category.name), category)
    for comparison in found.compared.comparisons:
        for arm in comparison.arms:
            base, label = comparison.base.label, arm.arm.label
            yield from _compared(base, arm)
            lossless = found.lossless[label]
            if isinstance(lossless, Greedy):
                yield from _identical(base, label, lossless)
            else:
                yield from _two_samples(base, label, lossless)


def _identical(base: str, label: str, found: Greedy) -> Iterator[Row]:
    for one in (*found.by_category, found.overall):
        here = _Place(label, "", "" if one is found.overall else one.name, base)
        yield here.row("identical_share", one.share, n=one.n_compared)
        yield here.row("noise_floor", one.floor)


def _two_samples(base: str, label: str, found: Sampled) -> Iterator[Row]:
    for one in (*found.by_category, found.overall):
        here = _Place(label, "", "" if one is found.overall else one.name, base)
        for name, p in (("tokens", one.tokens), ("lengths", one.lengths)):
            figure = Figure(p.value, why_not=p.why_not)
            n = one.n_conversations
            yield here.row(f"p_value_{name}", figure, definition="p_value", n=n)


def _compared(base: str, one: ArmComparison) -> Iterator[Row]:
    from speedbench.report.compare import overall_speedup

    for category in (*one.by_category, one.overall):
        name = "" if category is one.overall else category.name
        here = _Place(one.arm.label, "", name, base)
        n = category.n_pairs
        yield here.count("n_pairs", n, "n_pairs")
        yield here.row("al_base", category.al_base, "tokens/step", definition="al")
        yield here.row("al", category.al, "tokens/step")
        yield here.row("al_ratio", category.al_ratio, n=n)
        speedup = overall_speedup(one) if category is one.overall else category.user_tps
        yield here.row("speedup", speedup, n=n)
        yield here.row("step_time_ratio", category.step_time, n=n)
        yield here.row("ttft_ratio", category.ttft, n=n)
        yield here.row("predicted_speedup", category.predicted, n=n)
        yield here.row("residual", category.residual, definition="predicted_speedup", n=n)
    here = _Place(one.arm.label, "", "", base)
    yield here.row("system_speedup", one.output_tps)
    yield here.row("detectable", one.detectable)
    yield here.row(
        "between_run_sd", one.between.sd, definition="between_run", n=one.between.n_rounds
    )
    total = one.between.total
    yield here.row("speedup_with_runs", total, definition="between_run", n=one.between.n_rounds)


def of_run(summary: Summary, arm: str = "") -> Iterator[Row]:
    """The numbers of one run, those of the run before those of its categories."""
    here = _Place(arm, summary.run_dir)
    yield from _acceptance(here, summary)
    yield from _speed(here, summary)
    yield from _load(here, summary.load)
    yield from _counts(here, summary)
    yield from _published(here, summary)
    for category in summary.categories:
        yield from _category(_Place(arm, summary.run_dir, category.name), category)


def _acceptance(here: _Place, summary: Summary) -> Iterator[Row]:
    n_decode = sum(summary.histogram)
    for name, figure in summary.lengths.items():
        yield here.row(name, figure, "tokens/step")
    for k, (rate, joint) in enumerate(zip(summary.rates, summary.joint, strict=True), 1):
        yield here.row(f"conditional_rate_{k}", rate, definition="conditional_rate")
        yield here.row(f"joint_rate_{k}", joint, definition="joint_rate")
    yield here.row("draft_hit_rate", summary.draft_hit_rate, n=n_decode)
    if summary.expected_al is not None:
        figure = Figure(summary.expected_al)
        yield here.row("closed_form_al", figure, "tokens/step", definition="closed_form")


def _load(here: _Place, load: Load) -> Iterator[Row]:
    if (came := load.arrivals) is not None:
        nothing = came.why_not or "it was not told"
        for name, per_s in (("offered_rate", came.offered_per_s),
                            ("completed_rate", came.completed_per_s)):  # fmt: skip
            figure = Figure(per_s, why_not="" if per_s is not None else nothing)
            yield here.row(name, figure, "1/s", definition="arrivals", n=came.n)
    if (good := load.goodput) is not None:
        yield here.row("goodput", good.per_s, "1/s", n=good.n)
        yield here.row("goodput_share", good.share, definition="goodput", n=good.n)


def _speed(here: _Place, summary: Summary) -> Iterator[Row]:
    yield here.row("output_tps", summary.output_tps, "tokens/s")
    yield here.row("output_tps_steady", summary.output_tps_steady, "tokens/s")
    if summary.steady_duration_s is not None:
        figure = Figure(summary.steady_duration_s)
        yield here.row("steady_duration", figure, "s", definition="steady_window")
    yield here.row("output_tps_per_gpu", summary.output_tps_per_gpu, "tokens/s/GPU")
    for stored, found in summary.timing.items():
        name = stored.removesuffix("_s")
        unit = UNITS.get(name, "tokens")
        if found is None:
            missing = Figure(None, why_not=why_no_time(summary.manifest, stored))
            yield here.row(f"{name}_mean", missing, unit, definition=name, n=0)
            continue
        for statistic, value in found.items():
            if statistic != "n":
                why_not = "" if value is not None else "there is one value only"
                figure = Figure(value, why_not=why_not)
                n = int(found["n"] or 0)
                yield here.row(f"{name}_{statistic}", figure, unit, definition=name, n=n)


def _counts(here: _Place, summary: Summary) -> Iterator[Row]:
    if summary.manifest["engine"].get("simulated"):  # nothing else in these rows would tell
        yield here.count("simulated", 1, "count")
    yield here.count("n_conversations", summary.n_conversations, "count")
    yield here.count("n_failed", summary.n_failed, "completeness")
    yield here.count("n_requests", summary.n_requests, "count")
    yield here.count("n_steps", summary.n_steps, "step")
    yield here.count("n_output_tokens", summary.n_output_tokens, "output_tokens")
    for kind, count in summary.kinds.items():
        yield here.count(f"n_{kind.split(' ')[0]}", count, "step")
    for length, count in enumerate(summary.histogram, 1):
        yield here.count(f"histogram_{length}", count, "histogram")
    yield here.count("n_censored", summary.n_censored, "censored")


def _published(here: _Place, summary: Summary) -> Iterator[Row]:
    for length, count in enumerate(summary.published_histogram, 1):
        yield here.count(f"published_histogram_{length}", count, "as_published")
    for length, rate in enumerate(summary.published_rates, 2):
        yield here.row(f"published_rate_{length}", rate, definition="as_published")
    yield here.row(
        "published_al_token_weighted",
        summary.published_al_step,
        "tokens/step",
        definition="as_published",
        n=sum(summary.published_histogram),
    )


def _category(here: _Place, category: CategoryRow) -> Iterator[Row]:
    yield here.count("n_complete", category.n_complete, "completeness")
    yield here.count("n_expected", category.n_expected, "completeness")
    for name, figure in category.lengths.items():
        yield here.row(name, figure, "tokens/step", n=category.n_steps)
    for k, rate in enumerate(category.rates, 1):
        yield here.row(f"conditional_rate_{k}", rate, definition="conditional_rate")
    if category.expected_al is not None:
        figure = Figure(category.expected_al)
        yield here.row("closed_form_al", figure, "tokens/step", definition="closed_form")


def plain(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The rows as columns, in the order of their fields."""
    return {name: [getattr(row, name) for row in rows] for name in Row.__slots__}
