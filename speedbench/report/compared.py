"""Compared: which of a report's arms can be held against which baseline, and what that shows.

A report is of whatever it was given, so that arms that cannot be compared are no mistake here: why
is told. `speedbench compare` takes a base by name, and refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speedbench.report import comparable
from speedbench.report.arms import Arm, nearest
from speedbench.report.compare import Comparison, compare
from speedbench.types import UserError


@dataclass(frozen=True, slots=True)
class Compared:
    """comparisons: one for each baseline that some arm can be held against.

    not_compared  label of a speculative arm -> why it is in none
    """

    comparisons: tuple[Comparison, ...]
    not_compared: Mapping[str, str]


def compared(arms: Sequence[Arm]) -> Compared:
    """Every speculative arm against the one baseline that differs from it in speculation alone."""
    bases = [arm for arm in arms if arm.is_baseline]
    of_base: dict[str, list[Arm]] = {}
    not_compared: dict[str, str] = {}
    for arm in arms:
        if arm.is_baseline:
            continue
        alike = nearest(
            arm,
            [b for b in bases if not comparable.differences(b.manifest, arm.manifest)],
        )
        if len(alike) == 1:
            of_base.setdefault(alike[0].label, []).append(arm)
        else:
            not_compared[arm.label] = _why_not(arm, bases, alike)
    comparisons = []
    for base in bases:
        if others := of_base.get(base.label):
            try:
                comparisons.append(compare(base, others))
            except UserError as error:
                not_compared |= dict.fromkeys((arm.label for arm in others), str(error))
    return Compared(tuple(comparisons), not_compared)


def _why_not(arm: Arm, bases: Sequence[Arm], alike: Sequence[Arm]) -> str:
    if not bases:
        return "no baseline (--speculative_algorithm NONE) was named"
    if alike:
        return f"{len(alike)} baselines fit it: name one with `speedbench compare`"
    differing = comparable.differences(bases[0].manifest, arm.manifest)
    which = "the baseline differs" if len(bases) == 1 else "every baseline differs"
    return f"{which} in more than speculation, such as in {next(iter(differing))}"
