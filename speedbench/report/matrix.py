"""Matrix: models by categories, one metric at a time, as AIPerf's `speed-bench-report` has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from speedbench import metrics, stats
from speedbench.columns import Bools, Floats, Ints
from speedbench.config import SPEED_TIERS
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure, summarize
from speedbench.store import Run

Metric = Literal["accept_length", "accept_rate", "throughput"]
METRICS: tuple[Metric, ...] = ("accept_length", "accept_rate", "throughput")

NOTES: Mapping[Metric, str] = {
    "accept_length": "accept_length is al, tokens per decode step. Overall: the mean over the "
    "categories, n/a if one of them is. AIPerf counts drafted steps alone, which gives more where "
    "a drafter at times proposes nothing",
    "accept_rate": "accept_rate is accepted / drafted draft tokens, a probability. Overall: the "
    "mean over the categories, n/a if one of them is",
    "throughput": "throughput is output tokens/s over the whole run, in which all categories were "
    "served together",
}
"""What the numbers are, and where they are not what AIPerf's are."""


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One run. model: the target, and what tells its runs apart where there are several.

    cells  category -> figure, of the categories that this run was to measure
    """

    model: str
    cells: Mapping[str, Figure]
    overall: Figure


@dataclass(frozen=True, slots=True)
class Matrix:
    metric: Metric
    categories: tuple[str, ...]
    rows: tuple[MatrixRow, ...]


def matrix(arms: Sequence[Arm], metric: Metric) -> Matrix:
    """One row for each run; repeats of an arm are numbered, never averaged."""
    rows = []
    for model, run in _named(arms):
        if metric == "accept_length":
            cells, overall = _lengths(run)
        elif metric == "accept_rate":
            cells, overall = acceptance_rates(run)
        else:
            cells, overall = _throughput(run)
        rows.append(MatrixRow(model, cells, overall))
    return Matrix(metric, _in_order(name for row in rows for name in row.cells), tuple(rows))


def _named(arms: Sequence[Arm]) -> list[tuple[str, Run]]:
    """The runs with their names: the target's where that tells them apart."""
    targets = [_target(arm) for arm in arms]
    found = []
    for arm, target in zip(arms, targets, strict=True):
        name = target if targets.count(target) == 1 else f"{target}, {arm.label}"
        for number, run in enumerate(arm.runs, 1):
            repeat = f" (repeat {number} of {len(arm.runs)})" if len(arm.runs) > 1 else ""
            found.append((name + repeat, run))
    return found


def _target(arm: Arm) -> str:
    path = arm.manifest["config"].get("model_dir")
    return str(path).rstrip("/").rpartition("/")[2] if path else str(arm.manifest["engine"]["name"])


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """By name; the tiers of a throughput configuration from low to high entropy."""
    found = set(names)
    tiers = tuple(SPEED_TIERS)
    return tuple(sorted(found, key=tiers.index) if found <= set(tiers) else sorted(found))


# ---------------------------------------------------------------- the metrics


def _lengths(run: Run) -> tuple[dict[str, Figure], Figure]:
    summary = summarize(run)
    return {row.name: row.lengths["al"] for row in summary.categories}, summary.lengths["al"]


def _throughput(run: Run) -> tuple[dict[str, Figure], Figure]:
    """Of the run; and of its category, if it has but one."""
    overall = summarize(run).output_tps
    names = run.columns.categories
    if overall.value is not None:
        overall = Figure(overall.value, why_not="one throughput of the run")
    shared = Figure(None, why_not="categories that were served together have no throughput each")
    return dict.fromkeys(names, overall if len(names) == 1 else shared), overall


@dataclass(frozen=True, slots=True)
class _Drafts:
    """Draft tokens of each measured conversation (C',).

    whole  (C',) the engine told of every decode step what was drafted, and every accepted count is
           told or seen
    """

    category: Ints
    accepted: Ints
    drafted: Ints
    whole: Bools


def acceptance_rates(run: Run) -> tuple[dict[str, Figure], Figure]:
    """Accepted / drafted tokens per category, and their mean; conversations are resampled."""
    columns = run.columns
    if int(run.manifest["engine"]["draft_length"]) == 0:
        nothing = Figure(None, why_not="nothing was drafted: the run does not speculate")
        return dict.fromkeys(columns.categories, nothing), nothing
    drafts = _drafts(run)
    n = len(columns.categories)
    sizes = np.bincount(drafts.category, minlength=n)
    once = _rates(drafts, np.ones((1, len(drafts.category))), n)[0]
    samples = _rates(drafts, stats.bootstrap_weights(drafts.category), n)
    cells = {}
    for g, name in enumerate(columns.categories):
        mine = drafts.category == g
        lone = "a single conversation has none" if sizes[g] < stats.MIN_CONVERSATIONS else ""
        cells[name] = _figure(
            float(once[g]), samples[:, g], _why_not(drafts, mine), lone, int(sizes[g]) - 1
        )
    missing = [f"category {name}: {f.why_not}" for name, f in cells.items() if f.value is None]
    lone = next(
        (f"category {name}: {f.why_not}" for name, f in cells.items() if f.interval is None), ""
    )
    overall = _figure(
        float(once.mean()) if n else float("nan"),
        samples.mean(axis=1),
        missing[0] if missing else "no conversation was measured",
        lone,
        int((sizes[sizes > 0] - 1).sum()),
    )
    return cells, overall


def _drafts(run: Run) -> _Drafts:
    columns = run.columns
    k = int(run.manifest["engine"]["draft_length"])
    kinds = metrics.step_kinds(columns, k)
    length, censored = metrics.step_lengths(columns, kinds, k)
    verify = kinds == metrics.VERIFY
    accepted = length - 1  # of a verify step that is not censored: what it accepted
    unknown = (kinds == metrics.DECODE) | (verify & censored)
    conversation = columns.conversation[columns.request]
    n = len(columns.conversation_ids)
    measured = ~columns.failed

    def total(weights: Ints, mask: Bools) -> Ints:
        found = np.bincount(conversation[mask], weights[mask], n)
        return np.asarray(found, np.int64)[measured]

    return _Drafts(
        category=columns.category[measured],
        accepted=total(accepted, verify),
        drafted=total(columns.drafted, verify),
        whole=total(np.ones_like(length), unknown) == 0,
    )


def _rates(drafts: _Drafts, weights: Floats, n_categories: int) -> Floats:
    """(B, G) accepted / drafted of each category, NaN where it is not known."""
    rates = np.full((len(weights), n_categories), np.nan)
    for g in range(n_categories):
        mine = drafts.category == g
        if mine.any() and drafts.whole[mine].all():
            accepted = weights[:, mine] @ drafts.accepted[mine]
            drafted = weights[:, mine] @ drafts.drafted[mine]
            np.divide(accepted, drafted, out=rates[:, g], where=drafted > 0)
    return rates


def _why_not(drafts: _Drafts, mine: Bools) -> str:
    if not mine.any():
        return "no conversation was measured"
    if not drafts.whole[mine].all():
        return (
            f"the engine does not tell in {int((~drafts.whole[mine]).sum())} of "
            f"{int(mine.sum())} conversations what every step drafted and accepted"
        )
    return "no draft was checked"


def _figure(value: float, samples: Floats, why_not: str, why_none: str, degrees: int) -> Figure:
    """A rate with its interval; why_not: why it would be unknown, why_none: its interval."""
    if np.isnan(value):
        return Figure(None, why_not=why_not)
    if why_none:
        return Figure(value, why_not=why_none)
    bounds = stats.widened(stats.percentile_interval(samples), value, degrees)
    if np.isnan(bounds).any():
        return Figure(value, why_not="too few conversations drafted anything")
    low, high = np.clip(bounds, 0, 1)
    return Figure(value, (float(low), float(high)))
