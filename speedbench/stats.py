"""Intervals: how sure a number is, with the conversation as the unit of resampling."""

from __future__ import annotations

import warnings

import numpy as np

from speedbench.columns import Floats, Ints

N_RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_weights(category: Ints, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Floats:
    """How often each conversation (C,) is drawn in each resample: (B, C).

    Conversations are drawn with replacement within their category, so every resample has the
    run's category sizes (stratified cluster bootstrap; Davison & Hinkley 1997, section 3.2).
    """
    generator = np.random.default_rng(seed)
    weights = np.zeros((n_resamples, len(category)))
    for g in np.unique(category):
        members = np.flatnonzero(category == g)
        share = np.full(len(members), 1 / len(members))
        weights[:, members] = generator.multinomial(len(members), share, n_resamples)
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
