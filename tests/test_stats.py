"""Intervals: against a brute-force twin, for their coverage, and paired speedups by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from speedbench import stats
from speedbench.report.summary import summarize
from tests.builders import conversation, stored
from tests.test_metrics import twin

# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PairedSpeedup:
    """Geometric mean ratios with their intervals, per category (G,), (G, 2) and over categories."""

    n_pairs: Any
    per_category: Any
    per_category_interval: Any
    overall: float
    overall_interval: Any


def paired_speedup(base: Any, spec: Any, category: Any, n_categories: int) -> PairedSpeedup:
    """As comparisons do it: log ratios averaged within a category, then over categories."""
    found = stats.category_means(np.log(spec) - np.log(base), category, n_categories)
    n_pairs = np.bincount(category, minlength=n_categories)
    overall = stats.over_categories(found, n_pairs > 0)
    return PairedSpeedup(
        n_pairs,
        np.exp(found.value),
        np.exp(found.interval()),
        float(np.exp(overall.value)),
        np.exp(overall.interval()),
    )


def test_resamples_keep_the_size_of_every_category() -> None:
    category = np.array([0, 1, 0, 0, 2, 1, 0])
    weights = stats.bootstrap_weights(category, 500)
    assert weights.shape == (500, 7)
    for g, size in Counter(category.tolist()).items():
        assert weights[:, category == g].sum(axis=1) == pytest.approx(np.full(500, size))
    assert (weights[:, 4] == 1).all()  # alone in its category
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.15)


def test_resamples_are_repeatable_and_differ_by_seed() -> None:
    category = np.zeros(10, np.int64)
    first = stats.bootstrap_weights(category, 50)
    assert (first == stats.bootstrap_weights(category, 50)).all()
    assert (first != stats.bootstrap_weights(category, 50, seed=1)).any()


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_variance_of_a_resampled_mean_is_that_of_the_mean(n: int) -> None:
    """s^2 / n with the n - 1 divisor: drawing n of n would give (n - 1) / n of it."""
    values = np.random.default_rng(n).normal(size=n)
    means = stats.bootstrap_weights(np.zeros(n, np.int64), 40000) @ values / n
    assert means.var() == pytest.approx(values.var(ddof=1) / n, rel=0.04)
    assert means.mean() == pytest.approx(values.mean(), abs=0.02)


@pytest.mark.parametrize(("n_categories", "per_category"), [(11, 2), (11, 8), (1, 40)])
def test_interval_covers_the_truth_as_often_as_it_says(
    n_categories: int, per_category: int
) -> None:
    """Conversations scatter around their category's mean; the truth is the mean of those.

    With two conversations per category a bootstrap that draws both covers it in 80 %.
    """
    rng = np.random.default_rng(7)
    category = np.repeat(np.arange(n_categories), per_category)
    centre = np.linspace(1.5, 3.5, n_categories)
    hits, n_trials = 0, 300
    for trial in range(n_trials):
        values = centre[category] + rng.normal(0, 0.3, len(category))
        weights = stats.bootstrap_weights(category, 600, seed=trial)
        bounds = stats.percentile_interval(weights @ values / len(category))
        degrees = len(category) - n_categories
        low, high = stats.widened(bounds, values.mean(), degrees)
        hits += low <= centre.mean() <= high
    assert 0.91 <= hits / n_trials <= 0.99


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_interval_of_a_small_category_is_no_lie(n: int) -> None:
    """Student's t: exact for normal logarithms, however few."""
    rng = np.random.default_rng(n)
    hits, n_trials = 0, 500
    for _ in range(n_trials):
        ratio = np.exp(rng.normal(np.log(1.3), 0.2, n))
        found = paired_speedup(np.ones(n), ratio, np.zeros(n, np.int64), 1)
        hits += found.per_category_interval[0, 0] <= 1.3 <= found.per_category_interval[0, 1]
    assert 0.87 <= hits / n_trials <= 0.99


def test_widening_is_students_t_over_the_normal_quantile() -> None:
    """With one degree of freedom 12.7062 / 1.9600, with many nothing."""
    bounds = np.array([0.9, 1.2])
    assert stats.widened(bounds, 1.0, 1) == pytest.approx([1 - 0.64829, 1 + 1.29657], abs=1e-4)
    assert stats.widened(bounds, 1.0, 10**7) == pytest.approx([0.9, 1.2], abs=1e-6)


# --- the whole interval, brute force --------------------------------------------------------------


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def test_interval_of_a_stored_run_equals_brute_force_resampling(tmp_path: Path) -> None:
    """Copy the drawn conversations' steps into one pot, estimate, repeat 2000 times; of `al`, leave
    each conversation out once."""
    rng = np.random.default_rng(5)
    k = 3
    pots: dict[str, list[list[tuple[int, bool]]]] = {"a": [], "b": []}
    records = []
    for category, n in (("a", 6), ("b", 4)):
        for i in range(n):
            lengths = rng.integers(1, k + 2, rng.integers(8, 15)).tolist()
            records.append(conversation(f"{category}{i}", category, [1, *lengths]))
            steps = [(length, False) for length in lengths]
            steps[-1] = (lengths[-1], lengths[-1] <= k)
            pots[category].append(steps)
    summary = summarize(stored(tmp_path / "r", records))

    generator = np.random.default_rng(0)
    draws = {
        category: generator.multinomial(len(pot) - 1, [1 / len(pot)] * len(pot), 2000)
        for category, pot in pots.items()
    }
    pooled = []
    for b in range(2000):
        everything = []
        for category, pot in pots.items():
            drawn = [
                step
                for times, steps in zip(draws[category][b], pot, strict=True)
                for step in steps * times
            ]
            everything.append((Fraction(len(pot), len(pot) - 1), drawn))
        pooled.append(weighted_twin(everything, k))
    figure = summary.lengths["al_step"]
    assert figure.value is not None
    wider = 2.306004 / 1.959964  # Student's t with 6 + 4 - 2 degrees of freedom
    bounds = [figure.value + (quantile(pooled, q) - figure.value) * wider for q in (0.025, 0.975)]
    assert figure.interval == pytest.approx(bounds, abs=1e-5)

    variance, degrees = {}, {}
    for category, pot in pots.items():
        n, sizes = len(pot), [len(steps) for steps in pot]
        left = [estimate(pot[:i] + pot[i + 1 :], k) for i in range(n)]
        variance[category] = np.var(left) * (n - 1)
        degrees[category] = sum(sizes) ** 2 / sum(size**2 for size in sizes) - 1
    for row in summary.categories:
        half = t.ppf(0.975, degrees[row.name]) * variance[row.name] ** 0.5
        middle = estimate(pots[row.name], k)
        assert row.lengths["al"].interval == pytest.approx(
            (max(middle - half, 1), min(middle + half, k + 1))
        )
    overall = summary.lengths["al"]
    assert overall.value is not None
    known = sum(v**2 / (degrees[c] + 2) for c, v in variance.items())
    of_both = min(sum(variance.values()) ** 2 / known - 2, sum(degrees.values()))
    half = t.ppf(0.975, of_both) * sum(variance.values()) ** 0.5 / 2
    assert overall.interval == pytest.approx((overall.value - half, overall.value + half))


def estimate(pot: list[list[tuple[int, bool]]], k: int) -> float:
    found = twin([step for steps in pot for step in steps], k)[1]
    assert found is not None
    return float(found)


def weighted_twin(groups: list[tuple[Fraction, list[tuple[int, bool]]]], k: int) -> float:
    """The estimator over groups of steps that count `weight` times each."""
    total = surviving = Fraction(1)
    for position in range(1, k + 1):
        passed = sum(w * sum(n > position for n, _ in steps) for w, steps in groups)
        ended = sum(w * sum(n == position and not c for n, c in steps) for w, steps in groups)
        surviving *= Fraction(passed) / (passed + ended)
        total += surviving
    return float(total)


def test_no_interval_where_resamples_often_leave_the_number_undefined() -> None:
    samples = np.linspace(1, 2, 1000)
    assert stats.percentile_interval(samples).tolist() == pytest.approx([1.025, 1.975])
    samples[:5] = np.nan
    assert not np.isnan(stats.percentile_interval(samples)).any()
    samples[:20] = np.nan
    assert np.isnan(stats.percentile_interval(samples)).all()
    assert np.isnan(stats.percentile_interval(np.full(10, np.nan))).all()


def test_no_interval_from_a_single_conversation(tmp_path: Path) -> None:
    """One conversation per category would give an interval of no width: it gives none."""
    records = [conversation(c, c, [1, 2, 1, 4]) for c in "abc"]
    summary = summarize(stored(tmp_path / "r", records))
    assert summary.lengths["al"].value is not None
    for figure in (
        summary.lengths["al"],
        summary.rates[0],
        *(r.lengths["al"] for r in summary.categories),
    ):
        assert figure.interval is None
        assert "single conversation" in figure.why_not


# --- means with Student's t -----------------------------------------------------------------------


def test_category_means_are_a_one_sample_t_interval() -> None:
    rng = np.random.default_rng(1)
    category = np.array([0, 2, 0, 2, 2, 0, 0])
    values = rng.normal(size=7)
    found = stats.category_means(values, category, 4)
    for g in (0, 2):
        twin = ttest_1samp(values[category == g], 0).confidence_interval(0.95)
        assert found.interval()[g] == pytest.approx([twin.low, twin.high])
    assert np.isnan(found.value[[1, 3]]).all()
    assert np.isnan(found.interval()[[1, 3]]).all()


def test_what_is_alike_has_exactly_no_spread() -> None:
    """Sums of a third, or of what rounding left of it, are not a third: neither may count."""
    values = np.full(7, 1 / 3) + np.arange(7) * 1e-16
    found = stats.category_means(values, np.zeros(7, np.int64), 1)
    assert found.value[0] == np.round(1 / 3, 12)
    assert found.variance[0] == 0


def test_few_conversations_that_decide_give_few_degrees() -> None:
    """Sizes 3, 1, 1, 1: (6)^2 / 12 = 3 conversations, 2 degrees; sizes alike: n - 1."""
    values, category = np.arange(4.0), np.zeros(4, np.int64)
    assert stats.category_means(values, category, 1, np.array([3.0, 1, 1, 1])).degrees == [2]
    assert stats.category_means(values, category, 1, np.full(4, 5.0)).degrees == [3]
    assert stats.category_means(values, category, 1, np.array([1e9, 1, 1, 1])).degrees == [1]


def test_welch_degrees_by_hand() -> None:
    """(sum v)^2 / sum(v^2 / (f + 2)) - 2, between the least of f and their sum."""
    degrees = stats.welch_degrees(np.array([1.0, 2.0]), np.array([4.0, 10.0]))
    assert degrees == pytest.approx(14)  # never more than 4 + 10
    assert stats.welch_degrees(np.array([3.0]), np.array([7.0])) == pytest.approx(7)
    assert stats.welch_degrees(np.ones(11), np.ones(11)) == pytest.approx(11)
    assert stats.welch_degrees(np.array([1.0, 0.0]), np.array([5.0, 9.0])) == pytest.approx(5)
    assert stats.welch_degrees(np.zeros(3), np.array([1.0, 2.0, 3.0])) == pytest.approx(6)
    assert stats.welch_degrees(np.array([1.0, 3.0]), np.full(2, 2.0)) == pytest.approx(4)
    assert stats.welch_degrees(np.array([1.0, 5.0]), np.full(2, 2.0)) == pytest.approx(36 / 6.5 - 2)
    # Published: 20 and 24 values, standard errors .0671111 and .1221422, Welch's degrees 36.2258.
    of_two = stats.welch_degrees(np.array([0.0671111, 0.1221422]) ** 2, np.array([19.0, 23.0]))
    assert of_two == pytest.approx(36.2258, abs=1e-4)


def test_mean_over_categories_is_of_those_that_are_there() -> None:
    by_category = stats.Estimate(
        np.array([1.0, np.nan, 3.0]), np.array([0.2, np.nan, 0.6]), np.array([4.0, np.nan, 4.0])
    )
    found = stats.over_categories(by_category, np.array([True, False, True]))
    assert found.value == 2
    assert found.variance == pytest.approx((0.2 + 0.6) / 4)
    assert np.isnan(stats.over_categories(by_category, np.ones(3, bool)).value)
    assert np.isnan(stats.over_categories(by_category, np.zeros(3, bool)).value)
    last = stats.with_overall(by_category, np.array([True, False, True]))
    assert (last.value[-1], len(last.value)) == (2, 4)


def test_pseudo_values_of_a_mean_are_the_values_themselves() -> None:
    values = np.array([2.0, 5.0, 11.0, 4.0])
    rows = np.stack([values, np.ones(4)], axis=1)
    found = stats.pseudo_values(rows, lambda sums: sums[..., 0] / sums[..., 1])
    assert found == pytest.approx(values)
    alone = stats.pseudo_values(rows[:1], lambda sums: sums[..., 0] / sums[..., 1])
    assert alone == pytest.approx([2])


def test_pseudo_values_spread_as_a_ratio_of_sums_does() -> None:
    """Against the variance over many samples of the same kind."""
    rng = np.random.default_rng(4)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return np.asarray(sums[..., 0] / sums[..., 1])

    size = rng.uniform(5, 15, (4000, 40))
    share = rng.normal(2, 0.3, (4000, 40))
    samples = np.stack([size * share, size], axis=-1)
    true = ratio(samples.sum(axis=1)).var()
    told = [stats.pseudo_values(rows, ratio).var(ddof=1) / 40 for rows in samples[:500]]
    assert np.mean(told) == pytest.approx(true, rel=0.1)


# --- repeats --------------------------------------------------------------------------------------


def test_rounds_are_a_two_way_analysis_of_variance() -> None:
    """One category: the mean square of what is left, by its textbook form."""
    rng = np.random.default_rng(8)
    values = rng.normal(size=(3, 5))
    by_round, own = stats.round_means(values, np.zeros(5, np.int64), 1)
    assert by_round == pytest.approx(values.mean(axis=1))
    rest = sum(
        (values[r, i] - values[r].mean() - values[:, i].mean() + values.mean()) ** 2
        for r in range(3)
        for i in range(5)
    )
    assert own == pytest.approx(rest / (2 * 4) / 5)
    found = stats.between(by_round, own)
    assert found.sd == pytest.approx(np.std(by_round, ddof=1))
    assert found.variance == pytest.approx(max(0, by_round.var(ddof=1) - own) / 3)
    assert found.degrees == 2
    assert stats.between(np.array([1.0, 1.1]), 5.0).variance == 0


def test_two_categories_explain_half_as_much_of_a_round() -> None:
    """Categories that differ wildly in level, and by round, leave the same rest."""
    rest = np.array([[1.0, -1.0], [-1.0, 1.0]])
    values = np.concatenate([rest, rest + 100 + np.array([[0.0], [7.0]])], axis=1)
    by_round, own = stats.round_means(values, np.array([0, 0, 1, 1]), 2)
    assert by_round == pytest.approx([50, 53.5])
    assert own == pytest.approx(2 * (4 / 1 / 1 / 2) / 2**2)


def test_smallest_difference_is_found_in_80_percent_of_cases() -> None:
    """2.80 standard errors of one difference, or of the difference of two runs."""
    assert stats.smallest_difference(1.959964) == pytest.approx(2.801585)
    assert stats.smallest_difference(1.959964, n_runs=2) == pytest.approx(2.801585 * 2**0.5)
    rng = np.random.default_rng(6)
    se = 0.02
    least = stats.smallest_difference(1.959964 * se, n_runs=2)
    runs = rng.normal(0, se, (2, 20000))
    found = abs(runs[1] + least - runs[0]) > 1.959964 * se * 2**0.5
    assert found.mean() == pytest.approx(0.8, abs=0.01)


# --- speedups -------------------------------------------------------------------------------------


def speedup(ratios: dict[int, list[float]], n_categories: int) -> PairedSpeedup:
    """Pairs whose baselines differ wildly, so that only their ratios can matter."""
    category = np.array([g for g, values in ratios.items() for _ in values], np.int64)
    ratio = np.array([value for values in ratios.values() for value in values])
    base = 10.0 ** np.arange(len(ratio)) if len(ratio) else np.zeros(0)
    return paired_speedup(base, base * ratio, category, n_categories)


def test_speedup_is_a_geometric_mean_within_and_over_categories() -> None:
    """1 and 4 make 2; 8, 8, 8 make 8; 2 and 8 make 4, however many pairs each has."""
    found = speedup({0: [1, 4], 1: [8, 8, 8]}, 2)
    assert found.per_category == pytest.approx([2, 8])
    assert found.overall == pytest.approx(4)
    assert found.n_pairs.tolist() == [2, 3]
    assert found.per_category_interval[1] == pytest.approx([8, 8])
    wide = 12.706205  # Student's t with one degree of freedom; the standard error is ln 2
    assert found.per_category_interval[0] == pytest.approx([2 / 2**wide, 2 * 2**wide], rel=1e-4)


def test_speedup_of_swapped_arms_is_the_inverse() -> None:
    rng = np.random.default_rng(2)
    base, spec = rng.uniform(50, 60, 30), rng.uniform(80, 130, 30)
    category = np.repeat([0, 1, 2], 10)
    there = paired_speedup(base, spec, category, 3)
    back = paired_speedup(spec, base, category, 3)
    assert there.overall * back.overall == pytest.approx(1)
    assert there.overall_interval[::-1] * back.overall_interval == pytest.approx([1, 1])


def test_speedup_leaves_out_a_category_without_pairs() -> None:
    found = speedup({1: [2, 2]}, 3)
    assert np.isnan(found.per_category[[0, 2]]).all()
    assert np.isnan(found.per_category_interval[[0, 2]]).all()
    assert found.overall == pytest.approx(2)
    assert found.overall_interval == pytest.approx([2, 2])


def test_speedup_has_no_interval_from_one_pair_and_none_at_all_from_none() -> None:
    one = speedup({0: [3], 1: [2, 4]}, 2)
    assert one.overall == pytest.approx((3 * 8**0.5) ** 0.5)
    assert np.isnan(one.overall_interval).all()
    assert np.isnan(one.per_category_interval[0]).all()
    none = speedup({}, 2)
    assert np.isnan(none.overall)
    assert np.isnan(none.overall_interval).all()


def test_interval_of_a_speedup_covers_it() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        ratio = np.exp(rng.normal(np.log(1.7), 0.25, 60))
        found = paired_speedup(np.ones(60), ratio, np.repeat([0, 1, 2], 20), 3)
        hits += found.overall_interval[0] <= 1.7 <= found.overall_interval[1]
    assert 0.90 <= hits / 200 <= 0.99
