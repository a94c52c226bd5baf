"""Pareto: what load and draft length do to the speed of one user and to that of the whole machine.

Arms that differ in nothing but speculation and concurrency are one `setting`; within it, arms of
one drafter differ in K and concurrency only. Ratios are `compare`'s: of user TPS paired per
conversation, of output TPS with an interval over repeats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from speedbench import metrics, stats
from speedbench.columns import Floats
from speedbench.report import groups, sample
from speedbench.report.arms import Arm
from speedbench.report.break_even import BreakEven, Speedup, break_even
from speedbench.report.compare import compare, overall_speedup
from speedbench.report.sample import Sample
from speedbench.report.summary import OPEN_LOOP, Figure, throughput
from speedbench.store import Run, n_replicas_of
from speedbench.types import UserError


@dataclass(frozen=True, slots=True)
class Point:
    """One arm: how fast it is for one user and in all.

    setting, drafter  what it has in common with the arms it is held against
    user_tps          mean over conversations of tokens after the first step / time after it
                      (tokens/s), each conversation's repeats averaged
    output_tps        output tokens/s, steady or whole and per GPU or not as `Pareto` says; mean
                      over repeats, which alone can give it an interval
    """

    arm: Arm
    setting: str
    drafter: str
    concurrency: int
    user_tps: Figure
    output_tps: Figure

    @property
    def draft_length(self) -> int:
        return self.arm.draft_length


@dataclass(frozen=True, slots=True)
class Frontier:
    """Points that no other of the same kind beats in both respects, by rising user TPS."""

    setting: str
    speculates: bool
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Best:
    """Which K is best at a concurrency; 0 is no speculation.

    of         what it is best in
    runner_up  the next best K, and its ratio to the best one
    alike      other K whose interval of the ratio to the best one contains 1
    untold     other K whose ratio has no interval, so that nobody knows
    why_not    why none can be named
    """

    setting: str
    drafter: str
    concurrency: int
    of: Literal["user TPS", "output TPS"]
    draft_lengths: tuple[int, ...]
    best: int | None
    runner_up: int | None
    ratio: Figure
    alike: tuple[int, ...] = ()
    untold: tuple[int, ...] = ()
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Pareto:
    """is_steady, per_gpu: what `output_tps` of the points is; why_whole, why_no_gpu: why not."""

    points: tuple[Point, ...]
    frontiers: tuple[Frontier, ...]
    speedups: tuple[Speedup, ...]
    best: tuple[Best, ...]
    break_even: tuple[BreakEven, ...]
    is_steady: bool
    why_whole: str
    per_gpu: bool
    why_no_gpu: str
    notes: tuple[str, ...] = ()


def is_sweep(arms: Sequence[Arm]) -> bool:
    """Whether there are two loads, or two draft lengths, to choose between."""
    loads = {arm.manifest["config"]["concurrency"] for arm in arms}
    lengths = {arm.draft_length for arm in arms if not arm.is_baseline}
    return len(loads) > 1 or len(lengths) > 1


def pareto(arms: Sequence[Arm], samples: Sequence[Sample] = ()) -> Pareto:
    """`samples`: of the arms, in their order, where they were made already."""
    is_steady, why_whole = _steadiness(arms)
    gpus = [gpus_of(arm.manifest) for arm in arms]
    why_no_gpu = next((why for _, why in gpus if why), "")
    settings, drafters = groups.settings(arms), groups.drafters(arms)
    outputs = [_outputs(arm.runs, is_steady) for arm in arms]
    points = tuple(
        Point(
            arm,
            setting,
            drafter,
            int(arm.manifest["config"]["concurrency"]),
            user_tps(arm.runs),
            _output_tps(values, 1 if why_no_gpu else n_gpus),
        )
        for arm, setting, drafter, values, (n_gpus, _) in zip(
            arms, settings, drafters, outputs, gpus, strict=True
        )
    )
    chosen = samples or [sample.of_arm(arm) for arm in arms]
    members = [_Member(*one) for one in zip(points, chosen, outputs, strict=True)]
    cells, notes = _cells(members)
    speedups = tuple(found for cell in cells for found in _speedups(cell))
    return Pareto(
        points=points,
        frontiers=tuple(_frontiers(points)),
        speedups=speedups,
        best=tuple(found for cell in cells for found in _best(cell)),
        break_even=tuple(break_even(speedups)),
        is_steady=is_steady,
        why_whole=why_whole,
        per_gpu=not why_no_gpu,
        why_no_gpu=why_no_gpu,
        notes=notes,
    )


# ---------------------------------------------------------------- one arm


def user_tps(runs: Sequence[Run]) -> Figure:
    """Mean over conversations of their user TPS. The interval is Student's t over conversations;
    with repeats, joined with that over the repeats' means; on the logarithm."""
    by_name: dict[str, list[float]] = {}
    by_run = []
    for run in runs:
        tps = metrics.conversation_user_tps(run.columns)
        known = np.flatnonzero(~np.isnan(tps))
        for i in known:
            by_name.setdefault(run.columns.conversation_ids[i], []).append(float(tps[i]))
        by_run.append(float(tps[known].mean()) if len(known) else math.nan)
    if not by_name:
        return Figure(None, why_not="no conversation has two steps")
    means = np.array([np.mean(values) for values in by_name.values()])
    value = float(means.mean())
    if len(means) < stats.MIN_CONVERSATIONS:
        return Figure(value, why_not="a single conversation has no interval")
    half = _half_width(means)
    if len(runs) > 1:
        half = math.hypot(half, _half_width(np.array(by_run)))
    return Figure(value, _around(value, half))


def _half_width(values: Floats) -> float:
    """Of the interval of a mean, by Student's t."""
    found = stats.category_means(values, np.zeros(len(values), np.int64), 1)
    return float(found.half_width()[0])


def _outputs(runs: Sequence[Run], is_steady: bool) -> tuple[Figure, ...]:
    """Output TPS of every repeat."""
    found = []
    for run in runs:
        whole, (steady, _), _ = throughput(run)
        if run.manifest["config"].get("request_rate"):
            whole = steady = Figure(None, why_not=OPEN_LOOP)
        found.append(steady if is_steady else whole)
    return tuple(found)


def _output_tps(outputs: Sequence[Figure], n_gpus: int) -> Figure:
    values = []
    for figure in outputs:
        if figure.value is None:
            return Figure(None, why_not=figure.why_not)
        values.append(figure.value / n_gpus)
    value = float(np.mean(values))
    if len(values) < 2:
        return Figure(value, why_not="one number of one run: repeat it (--repeat)")
    half = _half_width(np.array(values))
    return Figure(value, _around(value, half))


def _around(value: float, half: float) -> tuple[float, float]:
    """Bounds of a positive number, as far from it as `half` is on the logarithm (delta method: the
    standard error of log x is that of x over x), so that none is negative."""
    if value <= 0:
        return 0.0, half
    factor = math.exp(min(half / value, 100.0))
    return value / factor, value * factor


def _output_ratio(base: Sequence[Figure], arm: Sequence[Figure]) -> Figure:
    """Geometric mean over rounds, the i-th repeat of each; Student's t on the logarithms."""
    logs = []
    for mine, theirs in zip(base, arm, strict=False):
        for figure in (mine, theirs):
            if not figure.value:
                return Figure(None, why_not=figure.why_not or "no token was put out")
        logs.append(math.log((theirs.value or 1) / (mine.value or 1)))
    value = math.exp(float(np.mean(logs)))
    if len(logs) < 2:
        return Figure(value, why_not="one number of each run: repeat both arms (--repeat)")
    factor = math.exp(_half_width(np.array(logs)))
    return Figure(value, (value / factor, value * factor))


def _steadiness(arms: Sequence[Arm]) -> tuple[bool, str]:
    """Whether every arm that has a throughput has one of its steady window; else which has none.

    One kind for all: a whole run and a steady window are not the same quantity.
    """
    for arm in arms:
        for run in arm.runs:
            whole, (steady, _), _ = throughput(run)
            if whole.value is not None and steady.value is None:
                return False, f"{arm.label} has no steady window ({steady.why_not})"
    return True, ""


def gpus_of(manifest: Mapping[str, Any]) -> tuple[int, str]:
    """How many GPUs a run used, all its replicas together, and why it cannot be told per GPU."""
    config, engine = manifest["config"], manifest["engine"]
    n = int(config["tp_size"]) * int(config["pp_size"]) * int(config["dp_size"])
    if engine.get("simulated"):
        return 1, "the engine is simulated"
    if engine.get("settings", {}).get("device") == "cpu":
        return 1, "the engine used no GPU"
    if config.get("url"):
        return 1, "the GPUs of the server are not known"
    if not manifest["environment"].get("gpus"):
        return 1, "no GPU was found on the machine"
    return n * n_replicas_of(manifest), ""


# ---------------------------------------------------------------- what belongs together


@dataclass(frozen=True, slots=True)
class _Member:
    """An arm as comparisons need it. outputs: output TPS of every repeat."""

    point: Point
    sample: Sample
    outputs: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One drafter's arms at one concurrency, by K; the arm without speculation is K = 0."""

    setting: str
    drafter: str
    concurrency: int
    arms: Mapping[int, _Member]


def _cells(members: Sequence[_Member]) -> tuple[list[_Cell], tuple[str, ...]]:
    """Cells, and a sentence for each arm that is in none because another is in its place."""
    notes = []
    cells = []
    pairs = dict.fromkeys((m.point.setting, m.point.drafter) for m in members if m.point.drafter)
    for setting, drafter in pairs:
        mine = [
            m for m in members if m.point.setting == setting and m.point.drafter in ("", drafter)
        ]
        for concurrency in sorted({m.point.concurrency for m in mine if m.point.drafter}):
            by_k: dict[int, _Member] = {}
            for member in mine:
                point = member.point
                if point.concurrency == concurrency and point.draft_length in by_k:
                    notes.append(
                        f"{point.arm.label}: another arm has its K and concurrency, and this one "
                        "is in no choice of K"
                    )
                elif point.concurrency == concurrency:
                    by_k[point.draft_length] = member
            cells.append(_Cell(setting, drafter, concurrency, dict(sorted(by_k.items()))))
    return cells, tuple(dict.fromkeys(notes))


# ---------------------------------------------------------------- ratios


@dataclass(frozen=True, slots=True)
class _Ratio:
    user_tps: Figure
    output_tps: Figure


def _ratios(base: _Member, others: Mapping[int, _Member]) -> dict[int, _Ratio]:
    """K -> that arm over the base; without a value, and why, where the two are not comparable."""
    found = {}
    for k, other in others.items():
        try:
            one = compare(base.sample, [other.sample]).arms[0]
        except UserError as error:
            nothing = Figure(None, why_not=str(error))
            found[k] = _Ratio(nothing, nothing)
            continue
        found[k] = _Ratio(overall_speedup(one), _output_ratio(base.outputs, other.outputs))
    return found


def _speedups(cell: _Cell) -> Iterator[Speedup]:
    if 0 not in cell.arms:
        return
    others = {k: arm for k, arm in cell.arms.items() if k}
    for k, ratio in _ratios(cell.arms[0], others).items():
        yield Speedup(
            cell.setting, cell.drafter, k, cell.concurrency, ratio.user_tps, ratio.output_tps
        )


def _best(cell: _Cell) -> Iterator[Best]:
    """The best K by each measure: found against the first arm, then all others held against it."""
    lengths = tuple(cell.arms)
    if len(lengths) < 2:
        return
    first = lengths[0]
    against_first = _ratios(cell.arms[first], {k: a for k, a in cell.arms.items() if k != first})
    for of in ("user TPS", "output TPS"):
        values = {k: _of(ratio, of) for k, ratio in against_first.items()}
        known = {k: figure.value for k, figure in values.items() if figure.value is not None}
        if not known:
            why = next(iter(values.values())).why_not
            yield _none(cell, of, lengths, why)
            continue
        ranked = {first: 1.0, **known}
        best = max(ranked, key=lambda k: ranked[k])
        others = {k: arm for k, arm in cell.arms.items() if k in ranked and k != best}
        ratios = {k: _of(ratio, of) for k, ratio in _ratios(cell.arms[best], others).items()}
        yield _chosen(cell, of, best, ratios)


def _of(ratio: _Ratio, of: str) -> Figure:
    return ratio.user_tps if of == "user TPS" else ratio.output_tps


def _none(
    cell: _Cell, of: Literal["user TPS", "output TPS"], lengths: tuple[int, ...], why: str
) -> Best:
    nothing = Figure(None, why_not=why)
    return Best(
        cell.setting, cell.drafter, cell.concurrency, of, lengths, None, None, nothing, why_not=why
    )


def _chosen(
    cell: _Cell,
    of: Literal["user TPS", "output TPS"],
    best: int,
    ratios: Mapping[int, Figure],
) -> Best:
    """ratios: of the K that can be held against the best one; the others are `untold`."""
    known = {k: f for k, f in ratios.items() if f.value is not None}
    told = {k for k, f in known.items() if f.interval is not None}
    runner_up = max(known, key=lambda k: known[k].value or 0.0)
    return Best(
        cell.setting,
        cell.drafter,
        cell.concurrency,
        of,
        tuple(cell.arms),
        best,
        runner_up,
        known[runner_up],
        tuple(sorted(k for k, f in known.items() if f.interval and f.interval[1] >= 1)),
        tuple(k for k in cell.arms if k != best and k not in told),
    )


# ---------------------------------------------------------------- curves


def _frontiers(points: Sequence[Point]) -> Iterator[Frontier]:
    for setting in dict.fromkeys(point.setting for point in points):
        for speculates in (False, True):
            mine = [p for p in points if p.setting == setting and bool(p.drafter) == speculates]
            if found := frontier(mine):
                yield Frontier(setting, speculates, tuple(found))


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other is as good as in one respect and better than in the other."""
    known = [
        (p.user_tps.value, p.output_tps.value, p)
        for p in points
        if p.user_tps.value is not None and p.output_tps.value is not None
    ]
    kept: list[tuple[float, float, Point]] = []
    for user, output, point in sorted(known, key=lambda one: one[:2], reverse=True):
        if not kept or output > kept[-1][1] or (user, output) == kept[-1][:2]:
            kept.append((user, output, point))
    return [point for _, _, point in reversed(kept)]
