"""Random tokens against real prompts on one engine: by how much random prompts flatter it.

The prompts differ, so nothing is paired: each arm's conversations are resampled on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Floats
from speedbench.insights import rates
from speedbench.insights.figures import LONE, figure, ratio_of_repeats
from speedbench.insights.pairing import LENGTH, beside_prompts, is_random
from speedbench.insights.steps import conversations_of
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure


@dataclass(frozen=True, slots=True)
class Overestimate:
    """random / real, on the same engine and drafter, over conversations that did not fail.

    al          ratio of the two `al`, arithmetic means over categories: not the AL ratio of a
                comparison, which is of geometric ones
    output_tps  steady output TPS; its interval needs repeats of both arms
    differ      what else differs between the arms and is told, not refused
    lengths     mean tokens of (prompt, output) per request: of the random arm, of the real one
    """

    random: str
    real: str
    al: Figure
    user_tps: Figure
    output_tps: Figure
    differ: tuple[str, ...]
    lengths: tuple[tuple[float, float], tuple[float, float]]


def overestimates(arms: Sequence[Arm]) -> tuple[Overestimate, ...]:
    """Every pair of a random and a real arm that differ in their prompts alone."""
    return tuple(
        overestimate(random, real)
        for random in arms
        for real in arms
        if is_random(random) and not is_random(real) and not beside_prompts(random, real)
    )


def overestimate(random: Arm, real: Arm) -> Overestimate:
    found = {}
    for seed, (name, arm) in enumerate((("random", random), ("real", real))):
        conversations, _ = conversations_of(arm)
        n = len(conversations.ids)
        once, weights = np.ones((1, n)), conversations.weights(seed=seed)
        degrees = 0 if rates.lone(conversations).any() else conversations.degrees(once[0] > 0)
        found[name] = (
            (rates.al_of(arm, once), rates.al_of(arm, weights)),
            (rates.user_tps_of(arm, once), rates.user_tps_of(arm, weights)),
            degrees,
        )
    al_random, tps_random, degrees_random = found["random"]
    al_real, tps_real, degrees_real = found["real"]
    # The arm that knows its spread worst decides how far the interval is widened.
    degrees = min(degrees_random, degrees_real)
    al = _ratio(al_random, al_real, degrees, "an acceptance length is not known")
    if random.is_baseline:
        al = Figure(None, why_not="nothing was drafted")
    return Overestimate(
        random.label,
        real.label,
        al,
        _ratio(tps_random, tps_real, degrees, "a category has no conversation with a user TPS"),
        _output_tps(random, real),
        tuple(
            name
            for name in sorted(LENGTH)
            if random.manifest["config"].get(name) != real.manifest["config"].get(name)
        ),
        (_lengths(random), _lengths(real)),
    )


def _ratio(
    random: tuple[Floats, Floats], real: tuple[Floats, Floats], degrees: int, why_not: str
) -> Figure:
    """Interval on the scale of logarithms, where a ratio is a difference."""
    logs = [np.log(random[i]) - np.log(real[i]) for i in range(2)]
    found = figure(
        float(logs[0][0]),
        logs[1],
        degrees,
        why_not=why_not,
        why_none="" if degrees else f"{LONE}: a category has a single one",
    )
    if found.value is None:
        return found
    interval = found.interval
    return Figure(
        float(np.exp(found.value)),
        None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1]))),
        found.why_not,
    )


def _output_tps(random: Arm, real: Arm) -> Figure:
    of_arms: list[list[float]] = []
    for arm in (random, real):
        steady = [rates.output_tps(run)[1] for run in arm.runs]
        missing = [one.why_not for one in steady if one.value is None]
        if missing:
            return Figure(None, why_not=f"{arm.label}: {missing[0]}")
        of_arms.append([one.value for one in steady if one.value is not None])
    return ratio_of_repeats(*of_arms)


def _lengths(arm: Arm) -> tuple[float, float]:
    prompt, output, n = 0, 0, 0
    for run in arm.runs:
        columns = run.columns
        good = ~columns.failed[columns.conversation]
        prompt += int(columns.n_prompt_tokens[good].sum())
        output += int(columns.n_tokens[good[columns.request]].sum())
        n += int(good.sum())
    return (prompt / n, output / n) if n else (float("nan"), float("nan"))
