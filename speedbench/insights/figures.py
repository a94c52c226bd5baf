"""Figures of an insight: an estimate and its resamples -> a value with its interval, or why not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from speedbench import stats
from speedbench.columns import Floats
from speedbench.report.summary import RARE, Figure

LONE = "too few conversations for an interval"
ONE_RUN = "one run of each arm: only repeats can tell how much it varies"


def figure(
    value: float,
    samples: Floats | None,
    degrees: int,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    why_not: str = "not known",
    why_none: str = "",
) -> Figure:
    """From an estimate and its bootstrap samples (B,).

    degrees   conversations that tell it, less the categories they are drawn in
    why_not   why the value would be NaN
    why_none  why there can be no interval; empty if there can
    """
    if not math.isfinite(value):
        return Figure(None, why_not=why_not)
    if samples is None or why_none:
        return Figure(float(value), why_not=why_none or LONE)
    if degrees < 1:
        return Figure(float(value), why_not=LONE)
    bounds = stats.widened(stats.percentile_interval(samples), value, degrees)
    if not np.isfinite(bounds).all():
        return Figure(float(value), why_not=RARE)
    low, high = np.clip(bounds, min(lowest, value), max(highest, value))
    return Figure(float(value), (float(low), float(high)))


def symmetric(
    value: float,
    samples: Floats,
    degrees: int,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    why_not: str = "not known",
) -> Figure:
    """The value with Student's t times the samples' (B,) standard deviation on either side.

    For numbers that resampling itself moves to one side (a maximum, an entropy): the percentiles of
    their samples would not hold the value.
    """
    if not math.isfinite(value):
        return Figure(None, why_not=why_not)
    if degrees < 1:
        return Figure(float(value), why_not=LONE)
    if not np.isfinite(samples).all():
        return Figure(float(value), why_not=RARE)
    from scipy.special import stdtrit

    half = float(stdtrit(degrees, (1 + stats.LEVEL) / 2) * samples.std(ddof=1))
    return Figure(float(value), (max(lowest, value - half), min(highest, value + half)))


def of_repeats(values: Sequence[float], why_one: str = ONE_RUN) -> Figure:
    """The mean of what repeated runs gave, with Student's t interval; none of a single run."""
    if not values:
        return Figure(None, why_not="no run has it")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Figure(mean, why_not=why_one)
    from scipy.special import stdtrit

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + stats.LEVEL) / 2)) * error
    return Figure(mean, (mean - half, mean + half))


def ratio_of_repeats(numerator: Sequence[float], denominator: Sequence[float]) -> Figure:
    """Ratio of the geometric means of two arms' runs; interval by Welch's t of the logarithms."""
    if not numerator or not denominator:
        return Figure(None, why_not="one arm has no number")
    if min(numerator) <= 0 or min(denominator) <= 0:
        return Figure(None, why_not="a rate of zero has no ratio")
    logs = [np.log(values) for values in (numerator, denominator)]
    value = float(logs[0].mean() - logs[1].mean())
    if min(len(one) for one in logs) < 2:
        return Figure(math.exp(value), why_not=ONE_RUN)
    from scipy.special import stdtrit

    parts = [float(one.var(ddof=1)) / len(one) for one in logs]
    total = sum(parts)
    if total == 0:
        return Figure(math.exp(value), (math.exp(value), math.exp(value)))
    degrees = total**2 / sum(p**2 / (len(o) - 1) for p, o in zip(parts, logs, strict=True))
    half = float(stdtrit(degrees, (1 + stats.LEVEL) / 2)) * math.sqrt(total)
    return Figure(math.exp(value), (math.exp(value - half), math.exp(value + half)))
