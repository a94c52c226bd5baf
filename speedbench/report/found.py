"""Found: everything that a report of some arms says, computed, for the forms that programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speedbench.insights.collected import Insights, collect
from speedbench.insights.options import InsightOptions
from speedbench.lossless import Losslessness, losslessness
from speedbench.report import sample
from speedbench.report.arms import Arm
from speedbench.report.compare import Comparison
from speedbench.report.compared import Compared, compared
from speedbench.report.document import Told, told
from speedbench.report.pareto import Pareto, is_sweep, pareto
from speedbench.report.sample import Sample
from speedbench.report.summary import Resamples


@dataclass(frozen=True, slots=True)
class Found:
    """lossless  label of an arm -> its outputs against those of its baseline
    sweep     what the best settings are; None of arms that offer no choice
    """

    told: tuple[Told, ...]
    compared: Compared
    lossless: Mapping[str, Losslessness]
    sweep: Pareto | None
    insights: Insights


def found(arms: Sequence[Arm], options: InsightOptions | None = None) -> Found:
    """What a report takes from these arms."""
    resamples = Resamples()
    comparisons = compared(arms)
    return Found(
        told=tuple(told(arm, resamples) for arm in arms),
        compared=comparisons,
        lossless={
            label: one
            for comparison in comparisons.comparisons
            for label, one in _lossless(comparison)
        },
        sweep=pareto(arms, _samples(arms, comparisons)) if is_sweep(arms) else None,
        insights=collect(arms, options or InsightOptions()),
    )


def _samples(arms: Sequence[Arm], comparisons: Compared) -> list[Sample]:
    """Of every arm, those that were made for a comparison used again."""
    known = {
        one.label: one
        for comparison in comparisons.comparisons
        for one in (comparison.base, *(pair.arm for pair in comparison.arms))
    }
    return [known.get(arm.label) or sample.of_arm(arm) for arm in arms]


def _lossless(comparison: Comparison) -> list[tuple[str, Losslessness]]:
    base = comparison.base
    answers = [run.answers for run in base.runs]
    return [
        (
            one.arm.label,
            losslessness(
                answers,
                [run.answers for run in one.arm.runs],
                max(float(side.manifest["config"]["temperature"]) for side in (base, one.arm)),
            ),
        )
        for one in comparison.arms
    ]
