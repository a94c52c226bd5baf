"""Insights: everything that the stored records of some arms can tell beside their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from speedbench.insights import experts as routed
from speedbench.insights import position, random_tokens, saving, vocabulary
from speedbench.insights.energy import ArmEnergy, energy_of
from speedbench.insights.experts import ExpertDifference, ExpertUse
from speedbench.insights.options import InsightOptions
from speedbench.insights.pairing import beside_prompts, is_random
from speedbench.insights.served import ServedSession, served
from speedbench.insights.served_times import ServedTimes, served_times
from speedbench.insights.steps import Measured, measured
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure
from speedbench.store import load_energy
from speedbench.types import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """Dollars of GPU time per million output tokens of one arm."""

    label: str
    dollars_per_million: Figure


@dataclass(frozen=True, slots=True)
class Insights:
    """What there is; empty where the records hold nothing of the kind.

    unpaired   (random arm, real arm, in what else they differ), where no pair could be compared
    wanted     what the user asked for and the records do not hold: one sentence each
    faults     what could not be read: one sentence each
    """

    coverage: tuple[vocabulary.Coverage, ...]
    overestimates: tuple[random_tokens.Overestimate, ...]
    unpaired: tuple[tuple[str, str, tuple[str, ...]], ...]
    experts: tuple[ExpertUse, ...]
    expert_differences: tuple[ExpertDifference, ...]
    by_position: tuple[position.Slices, ...]
    by_thinking: tuple[position.Slices, ...]
    by_turn: tuple[position.Slices, ...]
    savings: tuple[saving.Saving, ...]
    costs: tuple[Cost, ...]
    energy: tuple[ArmEnergy, ...]
    served: tuple[ServedSession, ...]
    served_times: tuple[ServedTimes, ...]
    wanted: tuple[str, ...]
    faults: tuple[str, ...]


def collect(arms: Sequence[Arm], options: InsightOptions) -> Insights:
    """Raises UserError where what the user named cannot be used."""
    faults: list[str] = []
    covered, by_position, by_turn, thinking = [], [], [], []
    for one in measured([arm for arm in arms if not arm.is_baseline]):
        if (found := _covered(one, options, faults)) is not None:
            covered.append(found)
        if _in_total(one, faults):
            continue
        by_position.append(position.by_position(one, options.bin_tokens))
        by_turn.append(position.by_turn(one))
        if options.think_end:
            thinking.append(position.by_thinking(one, options.think_end))
    nothing: tuple[tuple[ExpertUse, ...], tuple[ExpertDifference, ...]] = ((), ())
    told, compared = _readable(lambda: routed.uses(arms, options.batch_tokens), nothing, faults)
    over = random_tokens.overestimates(arms)
    return Insights(
        coverage=tuple(covered),
        overestimates=over,
        unpaired=() if over else _unpaired(arms),
        experts=told,
        expert_differences=compared,
        by_position=tuple(one for one in by_position if len(one.slices) > 1),
        by_thinking=tuple(thinking),
        by_turn=tuple(one for one in by_turn if len(one.slices) > 1),
        savings=saving.savings(arms),
        costs=tuple(
            Cost(arm.label, saving.dollars_per_million(arm, options.gpu_hour_price))
            for arm in arms
            if options.gpu_hour_price is not None
        ),
        energy=_readable(lambda: _energy(arms), (), faults),
        served=_readable(lambda: served(arms), (), faults),
        served_times=_readable(lambda: served_times(arms), (), faults),
        wanted=_wanted(arms, options),
        faults=tuple(faults),
    )


FEW = 0.1


def _in_total(one: Measured, faults: list[str]) -> bool:
    """Whether of more than few requests the steps are told in total, not where they are: those of
    the others do not stand for all."""
    n_told = n_requests = 0
    for run in one.arm.runs:
        n_requests += run.columns.n_requests
        n_told += 0 if run.columns.told is None else len(run.columns.told.request)
    if n_told <= FEW * n_requests:
        return False
    faults.append(
        f"{one.arm.label}: of {n_told} of {n_requests} requests the server tells steps in total, "
        "not each where it is: nothing is said of acceptance along the answer"
    )
    return True


def _readable(make: Callable[[], T], otherwise: T, faults: list[str]) -> T:
    """What can be had of stored parts; a part that cannot be read spoils its own insight only."""
    try:
        return make()
    except UserError as error:
        faults.append(str(error))
        return otherwise


def _covered(
    of: Measured, options: InsightOptions, faults: list[str]
) -> vocabulary.Coverage | None:
    if options.draft_vocabulary is not None:
        return vocabulary.coverage(of, options)
    return _readable(lambda: vocabulary.coverage(of, options), None, faults)


def _energy(arms: Sequence[Arm]) -> tuple[ArmEnergy, ...]:
    """Of all arms, if any of them has samples."""
    if not any(len(load_energy(run)) for arm in arms for run in arm.runs):
        return ()
    return tuple(energy_of(arm) for arm in arms)


def _unpaired(arms: Sequence[Arm]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """The most alike pair of a random and a real arm, where none was alike enough."""
    pairs = [
        (random.label, real.label, beside_prompts(random, real))
        for random in arms
        for real in arms
        if is_random(random) and not is_random(real)
    ]
    return tuple(sorted(pairs, key=lambda pair: len(pair[2]))[:1])


def _wanted(arms: Sequence[Arm], options: InsightOptions) -> tuple[str, ...]:
    drafting = [arm for arm in arms if not arm.is_baseline]
    wanted = []
    for flag, given in (
        ("--think_end", options.think_end),
        ("--draft_vocabulary", options.draft_vocabulary),
    ):
        if given and not drafting:
            wanted.append(f"{flag} tells something of a speculative arm, and there is none here")
    return tuple(wanted)
