"""Comparison: arms held against a base arm on the same prompts, conversation by conversation.

Everything is computed on logarithms: one number per conversation and arm, subtracted where both
arms asked the same, averaged within a category and then over categories. So a ratio is a geometric
mean, and the overall speedup is the overall ratio of acceptance lengths over that of step times,
but for the residual that each row states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from speedbench import stats
from speedbench.checks import Check, is_chat
from speedbench.columns import Floats, Ints
from speedbench.report import comparable, sample, sides
from speedbench.report.arms import Arm
from speedbench.report.sample import Sample
from speedbench.report.sides import Side
from speedbench.report.summary import Figure
from speedbench.types import UserError

NOT_SERVED = Figure(None, why_not="no server was asked")


@dataclass(frozen=True, slots=True)
class CategoryComparison:
    """One category: acceptance of both arms, and how much faster the second one is.

    n_pairs      conversations that both arms measured with the same prompts (0: not paired)
    n_base, n    conversations of each arm that the figures are over
    al_base, al  acceptance length of each arm over these conversations, cut-off steps censored
    al_ratio     al / al_base, paired per conversation
    user_tps     geometric mean of the paired ratios of user TPS
    step_time    geometric mean of the paired ratios of mean step time, arm / base: what a step
                 with drafting costs. A conversation's mean step time is its decode time (first to
                 last step, over its turns) over its decode steps.
    ttft         geometric mean of the paired ratios of TTFT, arm / base: of a conversation, the
                 geometric mean over its turns
    predicted    al_ratio / step_time: the speedup that acceptance and step time would give
    residual     user_tps / predicted. User TPS is tokens per decode step as they look over step
                 time, so this holds what tells those tokens from the AL: last steps that show fewer
                 tokens than the engine accepted, and that a conversation counts once in a speedup,
                 but as often as it has steps in an AL.
    """

    name: str
    n_pairs: int
    n_base: int
    n: int
    al_base: Figure
    al: Figure
    al_ratio: Figure
    user_tps: Figure
    step_time: Figure
    ttft: Figure
    predicted: Figure
    residual: Figure


@dataclass(frozen=True, slots=True)
class BetweenRuns:
    """How much repeats differ in one ratio; round i holds the i-th repeat of each arm.

    by_round  overall ratio of each round
    sd        their relative standard deviation (of the log ratio)
    total     the overall ratio with the interval that holds both kinds of spread, that of
              conversations and that of runs (stats.half_width_of_both)
    """

    n_rounds: int
    by_round: tuple[float, ...]
    sd: Figure
    total: Figure


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where an embedded and a served run part: seconds of a conversation, over its turns, meaned
    within categories and then over them.

    part        "until the first tokens", "after them", or "together"
    base, arm   of each arm
    difference  arm - base, paired per conversation
    """

    part: str
    base: Figure
    arm: Figure
    difference: Figure


@dataclass(frozen=True, slots=True)
class ArmComparison:
    """One arm against the base: overall figures are means over the categories that have any.

    overall      acceptance lengths are arithmetic means over categories, ratios geometric ones:
                 al_ratio is not al / al_base there
    paired       the arms were asked the same; else every ratio is of two independent samples
    between, between_ttft  what differs between runs, of the ratio of user TPS and of that of TTFT
    output_tps   ratio of steady output TPS: an interval over repeats, none of a single run
    detectable   the least relative change of user TPS that such a comparison finds with 80 % power
                 at the 5 % level, from the interval of `between.total`
    n_left_out   why -> conversations that are in no paired figure
    whereabouts  of runs of which one asked a server; empty of others
    client       seconds of a conversation until the served arm's client had sent its requests
    checks       about the two as a pair, then those of the arm's own runs
    """

    arm: Sample
    by_category: tuple[CategoryComparison, ...]
    overall: CategoryComparison
    paired: bool
    output_tps: Figure
    between: BetweenRuns
    between_ttft: BetweenRuns
    detectable: Figure
    n_left_out: Mapping[str, int]
    checks: tuple[Check, ...]
    whereabouts: tuple[Whereabouts, ...] = ()
    client: Figure = NOT_SERVED


def overall_speedup(one: ArmComparison) -> Figure:
    """The user-TPS ratio over categories; where runs were repeated, with what differs between them
    in its interval. Every speedup of an arm that anything shows is this one."""
    return one.overall.user_tps if one.between.total.interval is None else one.between.total


@dataclass(frozen=True, slots=True)
class Comparison:
    """`checks` are those of the base's own runs."""

    base: Sample
    arms: tuple[ArmComparison, ...]
    checks: tuple[Check, ...]


OVERALL = "Overall"
NO_PAIR = "no conversation was measured in both arms"
NOT_IN_BOTH = "only one of the arms has conversations of it"
SINGLE = "an interval needs two conversations in a category"
CUT = "a position was reached only by steps that the end of a request cut off"
RARE = "too few conversations reach the longest steps for an interval"
UNCOUNTED = "its events merge engine steps, or may, and cannot be counted"
UNSTAMPED = "no conversation has a known TTFT in both arms"
JOINT = "the step times lack conversations whose events merge engine steps, or may"
ONE_ROUND = "there is one round: repeat both arms (--repeat) to know how much runs differ"


def compare(
    base: Arm | Sample, arms: Sequence[Arm | Sample], allow: Collection[str] = ()
) -> Comparison:
    """Raises UserError, naming the difference, where two arms are not comparable; `allow` names
    differences that are meant."""
    if not arms:
        raise UserError(
            f"there is no arm beside the base ({base.label}): name the run directories of another"
        )
    comparable.refuse_unknown([base.manifest, *(arm.manifest for arm in arms)], allow)
    for arm in arms:
        comparable.refuse_different(base, arm, allow)
    mine, *others = (
        one if isinstance(one, Sample) else sample.of_arm(one) for one in (base, *arms)
    )
    return Comparison(mine, tuple(_arm(mine, other) for other in others), tuple(_own_checks(mine)))


def significant(ratio: Figure) -> bool | None:
    """Whether the interval leaves out 1; None without an interval."""
    if ratio.interval is None:
        return None
    low, high = ratio.interval
    return not low <= 1 <= high


# ---------------------------------------------------------------- one arm


def _arm(base: Sample, arm: Sample) -> ArmComparison:
    both, left_out = _sides(base, arm)
    *by_category, overall = _rows(both)
    checks = [*_doubts(base, arm, both, left_out), *_own_checks(arm)]
    is_served = _asks_a_server(base) or _asks_a_server(arm)
    between = _between(both, overall.user_tps, [side.log_tps for side in both.each])
    between_ttft = _between(both, overall.ttft, [side.log_ttft for side in both.each])
    return ArmComparison(
        arm=arm,
        by_category=tuple(by_category),
        overall=overall,
        paired=both.paired,
        output_tps=_output_tps(base, arm),
        between=between,
        between_ttft=between_ttft,
        detectable=_detectable(between.total if between.n_rounds > 1 else overall.user_tps),
        n_left_out=left_out,
        checks=tuple(dict.fromkeys(checks)),
        whereabouts=tuple(_whereabouts(both)) if is_served else (),
        client=_client(both, base, arm) if is_served else NOT_SERVED,
    )


PARTS = ("until the first tokens", "after them", "together")


def _asks_a_server(arm: Sample) -> bool:
    return bool(arm.manifest["config"].get("url"))


def _whereabouts(both: _Both) -> Iterator[Whereabouts]:
    base, arm = (side.seconds.mean(axis=0)[:, :2] for side in both.each)
    columns = [(base[:, i], arm[:, i]) for i in (0, 1)]
    columns.append((base.sum(axis=1), arm.sum(axis=1)))
    for name, (mine, theirs) in zip(PARTS, columns, strict=True):
        each = [
            both.means(v, side.category) for v, side in zip((mine, theirs), both.each, strict=True)
        ]
        found = (*each, both.contrast(mine, theirs))
        figures = (_figures(both, one, NO_PAIR, SINGLE, _as_it_is)[-1] for one in found)
        yield Whereabouts(name, *figures)


def _client(both: _Both, base: Sample, arm: Sample) -> Figure:
    """Of the arm, if it asked a server, else of the base."""
    side = both.arm if _asks_a_server(arm) else both.base
    found = both.means(side.seconds.mean(axis=0)[:, 2], side.category)
    return _figures(both, found, "the client did not tell when it sent", SINGLE, _as_it_is)[-1]


def _as_it_is(values: Floats) -> Floats:
    return values


def _own_checks(arm: Sample) -> Iterator[Check]:
    """Of its runs, each once."""
    yield from dict.fromkeys(check for run in arm.runs for check in run.checks)


@dataclass(frozen=True, slots=True)
class _Both:
    """Base and arm over the conversations to compare; paired: the same ones in the same order.

    Estimates and lists of shape (G + 1,) are by category, and last over categories.
    """

    base: Side
    arm: Side
    categories: tuple[str, ...]
    paired: bool
    n_prompts: int

    @property
    def each(self) -> tuple[Side, Side]:
        return self.base, self.arm

    def contrast(self, base: Floats, arm: Floats, *, pseudo: bool = False) -> stats.Estimate:
        """Arm minus base (G + 1,) of logarithms per conversation.

        A conversation whose number is NaN (of a pair: in either arm) is left out.
        pseudo: they are pseudo-values, to which a conversation brings its steps
        """
        if self.paired:
            size = self.base.n_steps + self.arm.n_steps if pseudo else None
            return self.means(arm - base, self.base.category, size)
        mine, theirs = (
            self.means(values, side.category, side.n_steps if pseudo else None)
            for values, side in zip((base, arm), self.each, strict=True)
        )
        return stats.difference(theirs, mine)

    def means(self, values: Floats, category: Ints, size: Floats | None = None) -> stats.Estimate:
        """(G + 1,) of one number per conversation (P,)."""
        known, n = ~np.isnan(values), len(self.categories)
        size = None if size is None else size[known]
        found = stats.category_means(values[known], category[known], n, size)
        return stats.with_overall(found, np.bincount(category, minlength=n) > 0)

    def n(self, side: Side) -> list[int]:
        """(G + 1,) conversations."""
        counts = np.bincount(side.category, minlength=len(self.categories))
        return [*(int(n) for n in counts), len(side.category)]


def _sides(base: Sample, arm: Sample) -> tuple[_Both, Mapping[str, int]]:
    """Both arms over the conversations that count, and why others do not."""
    categories = tuple(sorted({name for run in (*base.runs, *arm.runs) for name in run.categories}))
    mine, theirs = ([run.measured for run in one.runs] for one in (base, arm))
    paired = comparable.same_prompts(base, arm)
    if paired:
        first, left_out = sides.pairs(mine, theirs)
        second = first
    else:
        (first, mine_out), (second, theirs_out) = sides.alone(mine), sides.alone(theirs)
        left_out = dict(Counter(mine_out) + Counter(theirs_out))
    return _Both(
        sides.side(mine, first, categories, base.draft_length),
        sides.side(theirs, second, categories, arm.draft_length),
        categories,
        paired,
        sum(len(mine[0].asked[name]) for name in first),
    ), left_out


def _rows(both: _Both) -> list[CategoryComparison]:
    """Figures of every category, and the overall ones last."""
    base, arm = both.each
    log_tps = [side.log_tps.mean(axis=0) for side in both.each]
    log_step = [side.log_step.mean(axis=0) for side in both.each]
    joint = [s.pseudo - t for s, t in zip(both.each, log_step, strict=True)]
    rest = [t - j for t, j in zip(log_tps, joint, strict=True)]
    user_tps, step_time = both.contrast(*log_tps), both.contrast(*log_step)
    ttft = both.contrast(*(side.log_ttft.mean(axis=0) for side in both.each))
    al = both.contrast(base.pseudo, arm.pseudo, pseudo=True).at(arm.log_al - base.log_al)
    predicted = both.contrast(*joint, pseudo=True).at(al.value - step_time.value)
    residual = both.contrast(*rest, pseudo=True).at(user_tps.value - predicted.value)
    if np.isnan(log_step[0]).any() or np.isnan(log_step[1]).any():
        predicted, residual = predicted.without_spread(), residual.without_spread()
        rare = JOINT
    else:
        rare = RARE
    either = f"{CUT}, or {UNCOUNTED}"
    columns = (
        _lengths(both, base),
        _lengths(both, arm),
        _figures(both, al, CUT, RARE),
        _figures(both, user_tps, NO_PAIR, SINGLE),
        _figures(both, step_time, UNCOUNTED, UNCOUNTED),
        _figures(both, ttft, UNSTAMPED, SINGLE),
        _figures(both, predicted, either, rare),
        _figures(both, residual, either, rare),
    )
    n_base, n = both.n(base), both.n(arm)
    return [
        CategoryComparison(name, n[i] if both.paired else 0, n_base[i], n[i], *figures)
        for i, (name, *figures) in enumerate(
            zip((*both.categories, OVERALL), *columns, strict=True)
        )
    ]


def _lengths(both: _Both, side: Side) -> list[Figure]:
    """Acceptance lengths (G + 1,) of one arm; their intervals stay within what is possible."""
    found = both.means(side.al_pseudo, side.category, side.n_steps).at(side.al)

    def possible(values: Floats) -> Floats:
        return np.clip(values, 1.0, side.draft_length + 1.0)

    return _figures(both, found, CUT, RARE, possible)


def _figures(
    both: _Both,
    found: stats.Estimate,
    no_value: str,
    no_interval: str,
    to: Callable[[Floats], Floats] = np.exp,
) -> list[Figure]:
    """(G + 1,) figures of an estimate; what lacks one gives the first reason that holds."""
    values, bounds = to(found.value), to(found.interval())
    n_base, n = both.n(both.base), both.n(both.arm)
    made: list[Figure] = []
    for i in range(len(values)):
        overall = i == len(both.categories)
        if not (n_base[i] and n[i]):
            made.append(Figure(None, why_not=NO_PAIR if both.paired else NOT_IN_BOTH))
        elif np.isnan(values[i]):
            why = _first_fault(both, made, lambda f: f.value is None) if overall else ""
            made.append(Figure(None, why_not=why or no_value))
        elif np.isnan(bounds[i]).any():
            why = _first_fault(both, made, lambda f: f.interval is None) if overall else ""
            single = min(n_base[i], n[i]) < stats.MIN_CONVERSATIONS
            made.append(
                Figure(float(values[i]), why_not=why or (SINGLE if single else no_interval))
            )
        else:
            made.append(Figure(float(values[i]), (float(bounds[i, 0]), float(bounds[i, 1]))))
    return made


def _first_fault(both: _Both, made: Sequence[Figure], is_fault: Callable[[Figure], bool]) -> str:
    """Which category keeps an overall figure from having what it lacks, and why."""
    for name, figure in zip(both.categories, made, strict=True):
        if is_fault(figure) and figure.why_not not in (NO_PAIR, NOT_IN_BOTH):
            return f"category {name}: {figure.why_not}"
    return ""


# ---------------------------------------------------------------- runs


def _between(both: _Both, overall: Figure, logs: Sequence[Floats]) -> BetweenRuns:
    """Round i: the i-th repeat of each arm. logs: (R, P) of base and arm; `overall` is of these."""
    n = min(len(values) for values in logs)
    if overall.value is None:
        nothing = Figure(None, why_not=overall.why_not)
        return BetweenRuns(n, (), nothing, nothing)
    g = len(both.categories)
    categories = [side.category for side in both.each]
    if both.paired:
        ratios, (category, _) = logs[1][:n] - logs[0][:n], categories
        known = ~np.isnan(ratios).any(axis=0)
        by_round, own = stats.round_means(ratios[:, known], category[known], g)
    else:
        every = [~np.isnan(values[:n]).any(axis=0) for values in logs]
        (mine, own_base), (theirs, own_arm) = (
            stats.round_means(values[:n, known], category[known], g)
            for values, known, category in zip(logs, every, categories, strict=True)
        )
        by_round, own = theirs - mine, own_base + own_arm
    each = tuple(float(value) for value in np.exp(by_round))
    if n < 2:
        none = Figure(None, why_not=ONE_ROUND)
        return BetweenRuns(n, each, none, Figure(overall.value, why_not=ONE_ROUND))
    rounds = stats.between(by_round, own)
    low, high = (float(bound) for bound in rounds.sd_interval)
    sd = Figure(rounds.sd, (low, high))
    if overall.interval is None:
        return BetweenRuns(n, each, sd, overall)
    half = float(np.log(overall.interval[1] / overall.interval[0]) / 2)
    factor = float(np.exp(stats.both_half_widths(half, rounds)))
    return BetweenRuns(
        n, each, sd, Figure(overall.value, (overall.value / factor, overall.value * factor))
    )


def _output_tps(base: Sample, arm: Sample) -> Figure:
    """Ratio of steady output TPS: geometric mean over rounds, Student's t on their logarithms."""
    logs = []
    for mine, theirs in zip(base.runs, arm.runs, strict=False):
        steady = (mine.output_tps, theirs.output_tps)
        for which, figure in zip(("base", "arm"), steady, strict=True):
            if not figure.value:
                why = figure.why_not or "no token in the steady window"
                return Figure(None, why_not=f"{which}: {why}")
        logs.append(np.log((steady[1].value or 0) / (steady[0].value or 1)))
    value = float(np.exp(np.mean(logs)))
    if len(logs) < 2:
        return Figure(value, why_not=f"one throughput of each run: {ONE_ROUND}")
    found = stats.category_means(np.array(logs), np.zeros(len(logs), np.int64), 1)
    low, high = (float(bound) for bound in np.exp(found.interval()[0]))
    return Figure(value, (low, high))


def _detectable(overall: Figure) -> Figure:
    """From the interval of an overall user-TPS ratio, relative to 1."""
    if overall.value is None or overall.interval is None:
        return Figure(None, why_not=overall.why_not)
    half = float(np.log(overall.interval[1] / overall.interval[0]) / 2)
    return Figure(
        float(np.expm1(stats.smallest_difference(half))),
        why_not="it is told from the width of an interval",
    )


# ---------------------------------------------------------------- doubts


def _doubts(base: Sample, arm: Sample, both: _Both, left_out: Mapping[str, int]) -> Iterator[Check]:
    yield from comparable.doubts(base, arm)
    if not both.paired:
        yield Check(
            "warning",
            "the arms were asked different prompts, so that no two conversations can be paired: "
            "their difference is in every ratio",
        )
    elif not left_out.get(sides.ASKED_OTHERWISE):
        how = "identical in both arms, token by token"
        if is_chat(base.manifest) or is_chat(arm.manifest):
            how = "the same messages in both arms; the server made the tokens"
        yield Check("note", f"all {both.n_prompts} prompts were {how}")
    for why, n_out in left_out.items():
        hint = HINTS.get(why, "")
        level: Literal["warning", "note"] = "note" if why == sides.UNTIMED else "warning"
        yield Check(level, f"{n_out} conversation(s) are in no ratio: {why}{hint}")
    if len(base.runs) != len(arm.runs):
        yield Check(
            "warning",
            f"the base has {len(base.runs)} repeat(s) and the arm {len(arm.runs)}: rounds pair the "
            "first of each, and the others are in the means only",
        )
    n_base, n = both.n(both.base), both.n(both.arm)
    empty = [name for i, name in enumerate(both.categories) if not (n_base[i] and n[i])]
    if empty and not (both.paired and len(empty) == len(both.categories)):
        yield Check(
            "warning",
            f"{', '.join(empty)}: no pair, and overall figures are of the other categories"
            if both.paired
            else f"{', '.join(empty)}: in one arm only, and overall figures are of each arm's own "
            "categories",
        )
    uncounted = sum(int(np.isnan(side.log_step).any(axis=0).sum()) for side in both.each)
    if uncounted:
        yield Check(
            "warning",
            f"{uncounted} conversation(s) have events that merge engine steps, or may: they are in "
            "no step time",
        )


HINTS: Mapping[str, str] = {
    sides.ASKED_OTHERWISE: ", where later turns hold each run's own replies (--history frozen "
    "makes them identical)",
}
