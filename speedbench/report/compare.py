"""Comparison: arms held against a base arm on the same prompts, conversation by conversation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from speedbench.checks import Check
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure


@dataclass(frozen=True, slots=True)
class CategoryComparison:
    """One category: acceptance of both arms, and how much faster the second one is.

    al_base, al  acceptance length of each arm
    al_ratio     al / al_base, paired per conversation
    user_tps     geometric mean of the paired ratios of user TPS
    step_time    ratio of mean step times, arm / base: what a step with drafting costs
    predicted    al_ratio / step_time: the speedup that acceptance and step time would give
    """

    name: str
    n_pairs: int
    al_base: Figure
    al: Figure
    al_ratio: Figure
    user_tps: Figure
    step_time: Figure
    predicted: Figure


@dataclass(frozen=True, slots=True)
class BetweenRuns:
    """How much repeats differ. sd: relative standard deviation of the overall user-TPS ratio from
    round to round; `total` is the overall ratio with the interval that holds both kinds of spread,
    that of conversations and that of runs."""

    n_rounds: int
    by_round: tuple[float, ...]
    sd: Figure
    total: Figure


@dataclass(frozen=True, slots=True)
class ArmComparison:
    """One arm against the base: overall figures are means over categories.

    output_tps   ratio of steady output TPS: an interval over repeats, none of a single run
    n_left_out   why -> conversations that are in no paired figure
    """

    arm: Arm
    by_category: tuple[CategoryComparison, ...]
    overall: CategoryComparison
    output_tps: Figure
    between: BetweenRuns
    n_left_out: Mapping[str, int]
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    base: Arm
    arms: tuple[ArmComparison, ...]
    checks: tuple[Check, ...]


def compare(base: Arm, arms: Sequence[Arm], allow: Collection[str] = ()) -> Comparison:
    """Raises UserError, naming the difference, where two arms are not comparable; `allow` names
    differences that are meant."""
    raise NotImplementedError


def significant(ratio: Figure) -> bool | None:
    """Whether the interval leaves out 1; None without an interval."""
    if ratio.interval is None:
        return None
    low, high = ratio.interval
    return not low <= 1 <= high
