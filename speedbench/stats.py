"""Intervals: how sure a number is, with the conversation as the unit of resampling."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Floats, Ints

N_RESAMPLES = 2000
LEVEL = 0.95
MIN_CONVERSATIONS = 2
"""Conversations a category needs to have an interval: one alone says nothing of the spread."""


def bootstrap_weights(category: Ints, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Floats:
    """How often each conversation (C,) counts in each resample: (B, C).

    Conversations are drawn with replacement within their category (stratified cluster bootstrap).
    Of a category's n, n - 1 are drawn and count n / (n - 1) times: drawing n would understate the
    variance by 1 / n, which is half of it where a category has two (Rao & Wu 1988, JASA
    83:231-241). A conversation alone in its category counts once, always.
    """
    generator = np.random.default_rng(seed)
    weights = np.ones((n_resamples, len(category)))
    for g in np.unique(category):
        members = np.flatnonzero(category == g)
        n = len(members)
        if n > 1:
            drawn = generator.multinomial(n - 1, np.full(n, 1 / n), n_resamples)
            weights[:, members] = drawn * (n / (n - 1))
    return weights


def percentile_interval(samples: Floats, level: float = LEVEL) -> Floats:
    """Percentile interval (..., 2) over the first axis of bootstrap samples (B, ...).

    NaN where more than 1 % of the resamples leave the number undefined.
    """
    tail = (1 - level) / 2
    enough = np.mean(~np.isnan(samples), axis=0) >= 0.99
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN only: not `enough`
        bounds = np.moveaxis(np.nanquantile(samples, [tail, 1 - tail], axis=0), 0, -1)
    return np.where(enough[..., None], bounds, np.nan)


def widened(bounds: Floats, estimate: Floats | float, degrees: Ints | int) -> Floats:
    """Bounds (..., 2) moved away from their estimate (...) by Student's t over the normal quantile.

    degrees: conversations less the categories they are drawn in. Few conversations know their own
    spread badly, and a percentile interval takes it for known: of two it would cover the truth
    every second time (Hesterberg 2015, The American Statistician 69:371-386, section 5.2).
    """
    from scipy.stats import norm, t

    tail = (1 + LEVEL) / 2
    factor = np.asarray(t.ppf(tail, degrees) / norm.ppf(tail))[..., None]
    centre = np.asarray(estimate, float)[..., None]
    return np.asarray(centre + (bounds - centre) * factor, float)


@dataclass(frozen=True, slots=True)
class PairedSpeedup:
    """Geometric mean ratios with their intervals, per category (G,), (G, 2) and over categories.

    NaN where a category has no pair; an interval is NaN where one cannot be had.
    """

    n_pairs: Ints
    per_category: Floats
    per_category_interval: Floats
    overall: float
    overall_interval: Floats


def paired_speedup(
    base: Floats, spec: Floats, category: Ints, n_categories: int, n_resamples: int = N_RESAMPLES
) -> PairedSpeedup:
    """How much faster `spec` is than `base`, conversation by conversation.

    base, spec: (P,) user TPS of the same conversation in each arm, both positive; category (P,).
    The log ratios are averaged within a category, then over categories; intervals resample
    conversations, so both arms of a pair stay together.
    """
    log_ratio = np.log(spec) - np.log(base)
    n_pairs = np.bincount(category, minlength=n_categories)
    once = _category_means(log_ratio, category, n_categories, np.ones((1, len(category))))
    weights = bootstrap_weights(category, n_resamples)
    samples = _category_means(log_ratio, category, n_categories, weights)
    present = n_pairs > 0
    few = n_pairs < MIN_CONVERSATIONS
    degrees = np.where(few, 1, n_pairs - 1)
    interval = np.exp(widened(percentile_interval(samples), once[0], degrees))
    interval[n_pairs < MIN_CONVERSATIONS] = np.nan
    if not present.any():
        return PairedSpeedup(n_pairs, np.exp(once[0]), interval, np.nan, np.full(2, np.nan))
    overall = float(once[0, present].mean())
    overall_interval = np.full(2, np.nan)
    if not few[present].any():
        bounds = percentile_interval(samples[:, present].mean(axis=1))
        overall_interval = np.exp(widened(bounds, overall, int(degrees[present].sum())))
    return PairedSpeedup(
        n_pairs, np.exp(once[0]), interval, float(np.exp(overall)), overall_interval
    )


def _category_means(values: Floats, category: Ints, n_categories: int, weights: Floats) -> Floats:
    """(B, G) weighted mean of the values (P,) of each category; NaN for a category without any."""
    means = np.full((len(weights), n_categories), np.nan)
    for g in np.unique(category):
        w = weights[:, category == g]
        means[:, g] = w @ values[category == g] / w.sum(axis=1)
    return means
