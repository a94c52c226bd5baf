"""Gate: whether an arm changed by no more than was allowed, told from a 95 % interval.

A gate passes when the whole interval lies within its margin, fails when the whole interval lies
beyond it, and is inconclusive else: a number that merely looks good enough is no proof.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from speedbench.lossless import Greedy, Losslessness
from speedbench.report import sides
from speedbench.report.compare import ArmComparison, BetweenRuns, CategoryComparison
from speedbench.report.summary import Figure
from speedbench.types import UserError
from speedbench.words import like

Outcome = Literal["pass", "fail", "inconclusive"]

METRICS: Mapping[str, tuple[Literal["fall", "rise"], str]] = {
    "al": ("fall", "acceptance length, paired per conversation"),
    "speedup": ("fall", "user TPS, paired per conversation"),
    "output_tps": ("fall", "steady output TPS, from run to run"),
    "step_time": ("rise", "time of a decode step"),
    "ttft": ("rise", "time to the first token, paired per conversation"),
    "lossless": ("fall", "share of identical outputs, less that between two baseline runs"),
}
"""What can be gated: the direction that is bad, and what it is."""

OF_CLOCKS = ("speedup", "output_tps", "step_time", "ttft")
"""Metrics that no two runs repeat to the last digit."""

MISSING = 0.01
"""Share of a category's conversations that may lack a pair and still let a gate pass."""

ANSWERED = (sides.IN_BASE_ONLY, sides.IN_ARM_ONLY, sides.NOT_IN_ALL, sides.ASKED_OTHERWISE)
"""Why a conversation is in no ratio though some run of it was answered."""

ALIKE = 8
"""Conversations without any difference that it takes before an interval of no width is believed:
had a third of all such conversations changed, eight would show it with 95 %."""

_FORM = re.compile(
    r"\s*(?P<metric>[A-Za-z_]+)\s*(?:\[(?P<category>[^\]]+)\]\s*)?=\s*"
    r"(?P<sign>\+-|\u00b1|[+-])\s*(?P<percent>\d+(?:\.\d+)?|\.\d+)\s*%\s*"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """By how much (`margin` > 0) a metric may change: a fraction of the base's value, or, of
    lossless, of all outputs (a difference of shares, told in percentage points).

    category  None: over all
    side      which change is bounded: a fall, a rise, or both (equivalence)
    """

    metric: str
    category: str | None
    side: Literal["fall", "rise", "both"]
    margin: float

    @property
    def name(self) -> str:
        return self.metric if self.category is None else f"{self.metric}[{self.category}]"

    @property
    def unit(self) -> str:
        """Of a change: per cent of the base's value; of shares, the points they are apart."""
        return "points" if self.metric == "lossless" else "%"

    @property
    def allowed(self) -> str:
        """'-1 %', '+5 %', '+-1 %'; of lossless '-1 points'."""
        sign = {"fall": "-", "rise": "+", "both": "+-"}[self.side]
        return f"{sign}{100 * self.margin:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class GateResult:
    """What a gate came to.

    change  relative change from base to arm; of `lossless`, the difference of the shares
    why     one sentence
    """

    gate: Gate
    arm: str
    outcome: Outcome
    change: Figure
    why: str


def parse_gate(text: str) -> Gate:
    """'al=-1%', 'al[coding]=-3%', 'step_time=+5%', 'speedup=+-2%'. Raises UserError."""
    match = _FORM.fullmatch(text.replace("\N{MINUS SIGN}", "-"))
    if match is None:
        raise UserError(
            f"--gate is '{text}': expected METRIC=-N% (may fall by N %), METRIC=+N% (may rise) or "
            "METRIC=+-N%, with [CATEGORY] after the metric for one category, such as "
            "al[coding]=-3%"
        )
    metric, sign = match["metric"].lower(), match["sign"]
    if metric not in METRICS:
        known = like(metric, METRICS, f"expected {', '.join(METRICS)}")
        raise UserError(f"--gate names the metric '{metric}', which there is not{known}")
    bad, _ = METRICS[metric]
    side = {"-": "fall", "+": "rise"}.get(sign, "both")
    if side not in (bad, "both"):
        wanted = {"fall": "-", "rise": "+"}[bad]
        raise UserError(
            f"--gate is '{text}', which would let {metric} {bad} without limit: give the most that "
            f"it may {bad}, such as {metric}={wanted}{match['percent']}%"
        )
    if metric == "output_tps" and match["category"] is not None:
        raise UserError(
            f"--gate is '{text}', but output_tps is of the whole run, in which categories share "
            "the batch: gate speedup of the category"
        )
    margin = float(match["percent"]) / 100
    if side != "rise" and margin >= 1:
        raise UserError(f"--gate is '{text}': nothing falls by 100 % or more, name a smaller one")
    return Gate(metric, match["category"], side, margin)  # type: ignore[arg-type]


# ---------------------------------------------------------------- outcomes


def evaluate(
    gates: Sequence[Gate],
    compared: ArmComparison,
    lossless: Losslessness,
    n_expected: Mapping[str, int],
    errors: Sequence[str],
) -> tuple[GateResult, ...]:
    """Every gate for one arm. Raises UserError where a gate names a category that there is not.

    n_expected  category -> conversations that both arms were to measure
    errors      error checks that stand against the records of either arm: no gate is answered from
                records that contradict themselves, so all are inconclusive
    """
    return tuple(_evaluated(gate, compared, lossless, n_expected, errors) for gate in gates)


def overall(results: Sequence[GateResult]) -> Outcome:
    """The worst: a failure outweighs what is inconclusive."""
    found = {result.outcome for result in results}
    return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"


def change_in_words(result: GateResult) -> str:
    """'-0.42 % (95 % -1.10 to +0.26)', of shares in points; or 'n/a'."""
    change = result.change
    if change.value is None:
        return "n/a"
    text = f"{_hundredths(change.value)} {result.gate.unit}"
    if change.interval is None:
        return text
    low, high = change.interval
    return f"{text} (95 % {_hundredths(low)} to {_hundredths(high)})"


def _hundredths(value: float) -> str:
    return f"{round(100 * value, 2) + 0.0:+.2f}"  # never -0.00


def _evaluated(
    gate: Gate,
    compared: ArmComparison,
    lossless: Losslessness,
    n_expected: Mapping[str, int],
    errors: Sequence[str],
) -> GateResult:
    known = sorted({*n_expected, *(row.name for row in compared.by_category)})
    if gate.category is not None and gate.category not in known:
        hint = like(gate.category, known, f"expected {', '.join(known)}")
        raise UserError(f"--gate {gate.name} names a category that no arm has{hint}")
    label = compared.arm.label
    ratio, n_pairs = _ratio(gate, compared, lossless)
    change = _change(ratio)

    def result(outcome: Outcome, why: str) -> GateResult:
        return GateResult(gate, label, outcome, change, why)

    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return result("inconclusive", f"the records cannot be right: {errors[0]}{more}")
    if ratio.value is None or ratio.interval is None:
        return result("inconclusive", ratio.why_not or "there is no interval")
    outcome = judge(ratio.interval, gate)
    if outcome != "pass":
        return result(outcome, _told(gate, outcome))
    if why := _too_alike(gate, ratio.interval, n_pairs):
        return result("inconclusive", why)
    if gate.metric == "lossless":
        why = _unanswered(lossless) or _uncompared(gate, compared, n_expected)
    else:
        why = _unpaired(gate, compared, n_expected)
    return result("inconclusive", why) if why else result("pass", _told(gate, outcome))


def judge(interval: tuple[float, float], gate: Gate) -> Outcome:
    """Of the ratio arm / base: all of its interval within the margin, all beyond it, or neither."""
    low, high = interval
    lowest = 1 - gate.margin if gate.side != "rise" else float("-inf")
    highest = 1 + gate.margin if gate.side != "fall" else float("inf")
    if lowest <= low and high <= highest:
        return "pass"
    return "fail" if high < lowest or low > highest else "inconclusive"


def _ratio(gate: Gate, compared: ArmComparison, lossless: Losslessness) -> tuple[Figure, int]:
    """What the gate looks at as a ratio arm / base (of `lossless`: 1 + the difference of shares),
    and of how many conversations."""
    if gate.metric == "lossless":
        return _kept(gate, lossless), 0
    rows = {row.name: row for row in compared.by_category}
    row = compared.overall if gate.category is None else rows.get(gate.category)
    if row is None:
        return Figure(None, why_not="the category has no pair of conversations"), 0
    of_tps = compared.between, compared.overall.user_tps
    figures = {
        "al": row.al_ratio,
        "speedup": _with_runs(row.user_tps, *of_tps),
        "output_tps": compared.output_tps,
        "step_time": _with_runs(row.step_time, *of_tps),
        "ttft": _with_runs(row.ttft, compared.between_ttft, compared.overall.ttft),
    }
    return figures[gate.metric], _n(row, compared)


def _with_runs(ratio: Figure, between: BetweenRuns, alone: Figure) -> Figure:
    """A ratio of times, its interval widened by what runs differ in as a whole.

    The interval of `ratio` holds the choice of conversations alone, and the same arm measured twice
    may well differ by more. What repeats add to an overall ratio (its interval with them, in
    `between`, against `alone`, that without) is taken for the same in every category, and that of
    user TPS for step times, too: a run as a whole is faster or slower. Where there is one round
    nothing is known of it: no interval.
    """
    both = between.total
    if ratio.interval is None or ratio.value is None:
        return ratio
    if both.interval is None or alone.interval is None:
        return Figure(ratio.value, why_not=both.why_not or alone.why_not or "no interval")
    added = _half(both.interval) ** 2 - _half(alone.interval) ** 2
    half = math.sqrt(_half(ratio.interval) ** 2 + max(0.0, added))
    centre = math.log(ratio.interval[0] * ratio.interval[1]) / 2
    return Figure(ratio.value, (math.exp(centre - half), math.exp(centre + half)))


def _half(interval: tuple[float, float]) -> float:
    """Half of its width, of the logarithms."""
    return math.log(interval[1] / interval[0]) / 2


def _n(row: CategoryComparison, compared: ArmComparison) -> int:
    """Conversations behind a row: pairs, or those of the smaller arm where there are none."""
    return row.n_pairs if compared.paired else min(row.n_base, row.n)


def _kept(gate: Gate, lossless: Losslessness) -> Figure:
    """1 + (share identical - floor). Without a floor it is held against 1, the most that a floor
    can be, which can only be too strict on a fall: what passes then passes against any floor. How
    far a share is above a floor that is not known, nothing tells."""
    if not isinstance(lossless, Greedy):
        return Figure(
            None,
            why_not="at temperature > 0 no output repeats, and a test that finds no difference "
            "proves none: gate losslessness at temperature 0",
        )
    rows = {row.name: row for row in lossless.by_category}
    row = lossless.overall if gate.category is None else rows.get(gate.category)
    if row is None:
        return Figure(None, why_not="the category has no output")
    if row.difference.value is not None:
        return _shifted(row.difference)
    share = row.share.interval
    if gate.side == "fall" and share is not None and share[0] >= 1 - gate.margin:
        return row.share
    return Figure(None, why_not=row.difference.why_not)


def _shifted(difference: Figure) -> Figure:
    if difference.value is None or difference.interval is None:
        return difference
    low, high = difference.interval
    return Figure(1 + difference.value, (1 + low, 1 + high))


def _change(ratio: Figure) -> Figure:
    """Relative to the base: ratio - 1."""
    if ratio.value is None:
        return ratio
    bounds = None if ratio.interval is None else (ratio.interval[0] - 1, ratio.interval[1] - 1)
    return Figure(ratio.value - 1, bounds, ratio.why_not)


def _told(gate: Gate, outcome: Outcome) -> str:
    if gate.side == "both":
        where = {"pass": "lies within", "fail": "lies beyond", "inconclusive": "is only partly in"}
        return f"the 95 % interval {where[outcome]} {gate.allowed}"
    if outcome == "inconclusive":
        return f"the 95 % interval reaches across {gate.allowed}"
    above = (gate.side == "fall") == (outcome == "pass")
    edge = "at or " if outcome == "pass" else ""
    return f"the whole 95 % interval is {edge}{'above' if above else 'below'} {gate.allowed}"


# ---------------------------------------------------------------- what must not pass in silence


def _too_alike(gate: Gate, interval: tuple[float, float], n_pairs: int) -> str:
    """Why an interval without width proves nothing; '' if it has one, or is to be believed."""
    if interval[0] < interval[1] or gate.metric == "lossless":
        return ""
    if gate.metric in OF_CLOCKS:
        return (
            "every ratio is the same to the last digit, as no two measurements are: compare "
            "two runs, not copies of one"
        )
    if n_pairs < ALIKE:
        return (
            f"all {n_pairs} conversations are alike in both arms, which is too few to know the "
            f"spread: {ALIKE} are needed"
        )
    return ""


def _unpaired(gate: Gate, compared: ArmComparison, n_expected: Mapping[str, int]) -> str:
    """Why too many conversations are in no pair for a pass; '' if they are not."""
    rows: Mapping[str, CategoryComparison] = {row.name: row for row in compared.by_category}
    for name, expected in n_expected.items():
        if gate.category not in (None, name):
            continue
        n = _n(rows[name], compared) if name in rows else 0
        if expected - n > MISSING * expected:
            reasons = ", ".join(f"{n} {why}" for why, n in compared.n_left_out.items() if n)
            return (
                f"{expected - n} of {expected} conversations of category {name} are in no number, "
                "and what they would show is not known"
                + (f" (left out in all: {reasons})" if reasons else "")
            )
    return ""


def _uncompared(gate: Gate, compared: ArmComparison, n_expected: Mapping[str, int]) -> str:
    """Why too many conversations are answered on neither side for a pass; '' if they are not.

    Those that are in no ratio for one of ANSWERED have outputs, which were compared or counted as
    missing; where one category is gated, any of them may be of it.
    """
    expected = sum(n for name, n in n_expected.items() if gate.category in (None, name))
    n = sum(row.n_pairs for row in compared.by_category if gate.category in (None, row.name))
    n += sum(compared.n_left_out.get(why, 0) for why in ANSWERED)
    if expected - n > MISSING * expected:
        return (
            f"{expected - n} of {expected} conversations were answered on neither side, and what "
            "they would show is not known"
        )
    return ""


def _unanswered(lossless: Losslessness) -> str:
    assert isinstance(lossless, Greedy)
    n = lossless.overall.n_compared
    if lossless.n_missing > MISSING * n:
        return (
            f"{lossless.n_missing} request(s) were answered on one side only, against {n} that "
            "were compared"
        )
    return ""
