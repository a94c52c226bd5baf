"""Intervals: how sure a number is, with the conversation as the unit of resampling.

Two ways, for two kinds of number. What is a mean of something that each conversation has by itself
(a log ratio of times) gets Student's t; what is a ratio of sums over conversations (an acceptance
length) becomes such a mean by the jackknife. The bootstrap serves what is neither.
docs/coverage.md shows how often each holds the truth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Bools, Floats, Ints

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
    from scipy.special import ndtri, stdtrit  # scipy.stats itself takes a second to import

    tail = (1 + LEVEL) / 2
    factor = np.asarray(stdtrit(degrees, tail) / ndtri(tail))[..., None]
    centre = np.asarray(estimate, float)[..., None]
    return np.asarray(centre + (bounds - centre) * factor, float)


# ---------------------------------------------------------------- means with Student's t


DIGITS = 12
"""Decimals of logarithms that are told apart: the others are what computing them has lost."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Numbers (...) with their squared standard errors and the degrees of freedom of those.

    value is NaN where there is nothing to tell it from, variance where nothing tells its spread.
    """

    value: Floats
    variance: Floats
    degrees: Floats

    def half_width(self) -> Floats:
        """Half of the interval at LEVEL (...): Student's t times the standard error."""
        from scipy.special import stdtrit

        return np.asarray(stdtrit(self.degrees, (1 + LEVEL) / 2) * np.sqrt(self.variance), float)

    def interval(self) -> Floats:
        """(..., 2)"""
        half = self.half_width()
        return np.stack([self.value - half, self.value + half], axis=-1)

    def at(self, value: Floats) -> Estimate:
        """With the same spread around other numbers."""
        return Estimate(np.round(value, DIGITS), self.variance, self.degrees)

    def without_spread(self) -> Estimate:
        return Estimate(self.value, np.full_like(self.variance, np.nan), self.degrees)


def category_means(
    values: Floats, category: Ints, n_categories: int, size: Floats | None = None
) -> Estimate:
    """Mean (G,) of the values (P,) of each category's conversations, category (P,).

    size: (P,) where the values are pseudo-values: how much each conversation has in the sums they
    are made of (its steps). The more unlike these are, the fewer conversations decide: the degrees
    of freedom are those of the effective number (sum m)^2 / sum m^2 (Kish 1992, Journal of Official
    Statistics 8:183-200).
    """
    n = np.bincount(category, minlength=n_categories)
    values = np.round(values, DIGITS)
    reference = np.zeros(n_categories)  # one of each category: what is alike is exactly alike
    reference[category[::-1]] = values[::-1]
    with np.errstate(invalid="ignore", divide="ignore"):  # of none: NaN
        mean = np.bincount(category, values - reference[category], n_categories) / n + reference
        squares = np.bincount(category, (values - mean[category]) ** 2, n_categories)
        variance = squares / (n - 1) / n
        effective = n.astype(float)
        if size is not None:
            in_sum = np.bincount(category, size, n_categories)
            effective = in_sum**2 / np.bincount(category, size**2, n_categories)
    few = n < MIN_CONVERSATIONS
    degrees = np.where(few, np.nan, np.maximum(effective - 1, 1.0))
    return Estimate(mean, np.where(few, np.nan, variance), degrees)


def over_categories(by_category: Estimate, there: Bools) -> Estimate:
    """Mean over those categories (G,) that are `there`; unknown where one of them is."""
    n = int(there.sum())
    if n == 0:
        return Estimate(*(np.asarray(np.nan) for _ in range(3)))
    parts = by_category.variance[there] / n**2
    degrees = welch_degrees(parts, by_category.degrees[there])
    value = np.asarray(by_category.value[there].mean())
    return Estimate(value, np.asarray(parts.sum()), degrees)


def with_overall(by_category: Estimate, there: Bools) -> Estimate:
    """(G + 1,): the categories, and last their mean."""
    last = over_categories(by_category, there)
    return Estimate(
        np.append(by_category.value, last.value),
        np.append(by_category.variance, last.variance),
        np.append(by_category.degrees, last.degrees),
    )


def difference(minuend: Estimate, subtrahend: Estimate) -> Estimate:
    """Of two estimates from conversations that have nothing in common."""
    variances = np.stack([minuend.variance, subtrahend.variance])
    return Estimate(
        minuend.value - subtrahend.value,
        variances.sum(axis=0),
        welch_degrees(variances, np.stack([minuend.degrees, subtrahend.degrees])),
    )


def welch_degrees(variances: Floats, degrees: Floats) -> Floats:
    """Degrees of freedom of a sum of variances, over the first axis.

    (sum v)^2 / sum(v^2 / (f + 2)) - 2 (Welch 1947, Biometrika 34:28-35). The better known form
    without the two corrections takes noise of the v for unlike variances, and is far too wide where
    many of them have a degree or two each. Never less than the least of those that matter, nor more
    than all of them; where every variance is 0, all.
    """
    total = variances.sum(axis=0) ** 2
    known = np.sum(variances**2 / (degrees + 2), axis=0)
    all_of_them = np.sum(degrees, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(known > 0, total / known - 2, all_of_them)
    return np.asarray(np.clip(found, np.min(degrees, axis=0), all_of_them))


def pseudo_values(rows: Floats | Ints, statistic: Callable[[Floats | Ints], Floats]) -> Floats:
    """(n,) what each of n conversations adds to a statistic of sums over them, by the jackknife.

    rows (n, W); statistic maps sums (..., W) to numbers (...). Their mean is the statistic of all,
    their spread is its spread (Tukey 1958, Annals of Mathematical Statistics 29:614), so that
    statistics of the same conversations can be subtracted one conversation at a time.
    """
    n, total = len(rows), rows.sum(axis=0)
    whole = statistic(total)
    if n < MIN_CONVERSATIONS:
        return np.full(n, whole)
    without = statistic(total - rows)
    return np.asarray(whole - (n - 1) * (without - without.mean()))


def of_sums(
    rows: Floats | Ints,
    category: Ints,
    n_categories: int,
    statistic: Callable[[Floats | Ints], Floats],
) -> tuple[Floats, Floats]:
    """A statistic of the sums of rows (P, W) by category (G,), and its pseudo-values (P,)."""
    by_category, pseudo = np.full(n_categories, np.nan), np.full(len(rows), np.nan)
    for g in np.unique(category):
        members = rows[category == g]
        by_category[g] = statistic(members.sum(axis=0))
        pseudo[category == g] = pseudo_values(members, statistic)
    return by_category, pseudo


# ---------------------------------------------------------------- repeats


def round_means(values: Floats, category: Ints, n_categories: int) -> tuple[Floats, float]:
    """Overall mean of every round (R,) of values (R, P), of the same conversations in each; and how
    large a variance between rounds these conversations explain, each by itself.

    The latter is what is left without the conversation's mean and the round's (rounds x
    conversations within each category, both random); 0 of one round.
    """
    n_rounds = len(values)
    n = np.bincount(category, minlength=n_categories)
    there = n > 0
    means = np.stack([category_means(v, category, n_categories).value for v in values])
    by_round = means[:, there].mean(axis=1)
    if n_rounds < 2:
        return by_round, 0.0
    rest = values - values.mean(axis=0) - (means - means.mean(axis=0))[:, category]
    squares = np.bincount(category, (rest**2).sum(axis=0), n_categories)[there]
    n = n[there]
    own = squares / np.maximum(n - 1, 1) / (n_rounds - 1) / n
    return by_round, float(own.sum() / len(n) ** 2)


@dataclass(frozen=True, slots=True)
class Rounds:
    """How much repeats differ.

    sd          standard deviation from round to round; sd_interval by chi-square, `degrees` of it
    variance    of a mean over the rounds, as far as its conversations do not explain it
    """

    sd: float
    sd_interval: Floats
    variance: float
    degrees: int


def between(by_round: Floats, explained: float) -> Rounds:
    """From the overall number of each round (R,), R > 1, and the variance of one round that its
    conversations explain: they are in the spread of the conversations' means already."""
    from scipy.special import chdtri

    n_rounds = len(by_round)
    sd = float(by_round.std(ddof=1))
    tail = (1 - LEVEL) / 2
    quantiles = chdtri(n_rounds - 1, [tail, 1 - tail])  # the upper one first
    return Rounds(
        sd,
        np.asarray(sd * np.sqrt((n_rounds - 1) / quantiles), float),
        max(0.0, sd**2 - explained) / n_rounds,
        n_rounds - 1,
    )


def both_half_widths(conversations: float, rounds: Rounds) -> float:
    """Half of the interval that holds the choice of conversations and that of runs, from the half
    of the interval over conversations.

    The squares of two half-widths add, each with the t of its own degrees (Banerjee 1961, Sankhya
    A 23:359-378): about LEVEL or more, whichever of the two dominates. Pooled degrees of freedom
    (Satterthwaite) cover the truth in 87 % with two rounds that differ much.
    """
    own = Estimate(np.zeros(()), np.asarray(rounds.variance), np.asarray(float(rounds.degrees)))
    return float(np.hypot(conversations, own.half_width()))


# ---------------------------------------------------------------- what can be found

Z_LEVEL, Z_POWER = 1.959963984540054, 0.8416212335729143
"""Quantiles of the normal distribution at (1 + LEVEL) / 2 and at a power of 80 %."""


def smallest_difference(half_width: float, n_runs: int = 1) -> float:
    """The least true difference that a two-sided test at 5 % finds in 80 % of cases.

    half_width  of the 95 % interval: of the difference itself (a log ratio of pairs), or of one of
                `n_runs` = 2 independent runs of one size and spread whose difference it is
    (Bloom 1995, Evaluation Review 19:547-556: 2.80 standard errors of the difference.)
    """
    return (1 + Z_POWER / Z_LEVEL) * float(np.sqrt(n_runs)) * half_width
