"""Intervals: against a brute-force twin, for their coverage, and paired speedups by hand."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from speedbench import stats
from speedbench.report.summary import summarize
from tests.builders import conversation, stored
from tests.test_metrics import twin

# --- weights --------------------------------------------------------------------------------------


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
    """A percentile interval alone covers a mean of two in half of the cases, of five in 87 %."""
    rng = np.random.default_rng(n)
    hits, n_trials = 0, 500
    for _ in range(n_trials):
        ratio = np.exp(rng.normal(np.log(1.3), 0.2, n))
        found = stats.paired_speedup(np.ones(n), ratio, np.zeros(n, np.int64), 1, n_resamples=400)
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
    """Copy the drawn conversations' steps into one pot, estimate, repeat 2000 times."""
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
    means, pooled = [], []
    for b in range(2000):
        by_category, everything = [], []
        for category, pot in pots.items():
            drawn = [
                step
                for times, steps in zip(draws[category][b], pot, strict=True)
                for step in steps * times
            ]
            estimate = twin(drawn, k)[1]
            assert estimate is not None
            by_category.append(float(estimate))
            everything.append((Fraction(len(pot), len(pot) - 1), drawn))
        means.append(sum(by_category) / 2)
        pooled.append(weighted_twin(everything, k))
    wider = 2.306004 / 1.959964  # Student's t with 6 + 4 - 2 degrees of freedom
    for name, samples in (("al", means), ("al_step", pooled)):
        figure = summary.lengths[name]
        assert figure.value is not None
        bounds = [
            figure.value + (quantile(samples, q) - figure.value) * wider for q in (0.025, 0.975)
        ]
        assert figure.interval == pytest.approx(bounds, abs=1e-5)


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


# --- speedups -------------------------------------------------------------------------------------


def speedup(ratios: dict[int, list[float]], n_categories: int) -> stats.PairedSpeedup:
    """Pairs whose baselines differ wildly, so that only their ratios can matter."""
    category = np.array([g for g, values in ratios.items() for _ in values], np.int64)
    ratio = np.array([value for values in ratios.values() for value in values])
    base = 10.0 ** np.arange(len(ratio)) if len(ratio) else np.zeros(0)
    return stats.paired_speedup(base, base * ratio, category, n_categories)


def test_speedup_is_a_geometric_mean_within_and_over_categories() -> None:
    """1 and 4 make 2; 8, 8, 8 make 8; 2 and 8 make 4, however many pairs each has."""
    found = speedup({0: [1, 4], 1: [8, 8, 8]}, 2)
    assert found.per_category == pytest.approx([2, 8])
    assert found.overall == pytest.approx(4)
    assert found.n_pairs.tolist() == [2, 3]
    assert found.per_category_interval[1] == pytest.approx([8, 8])
    wider = 12.706205 / 1.959964  # Student's t with one degree of freedom
    assert found.per_category_interval[0] == pytest.approx([2 / 2**wider, 2 * 2**wider], rel=1e-4)


def test_speedup_of_swapped_arms_is_the_inverse() -> None:
    rng = np.random.default_rng(2)
    base, spec = rng.uniform(50, 60, 30), rng.uniform(80, 130, 30)
    category = np.repeat([0, 1, 2], 10)
    there = stats.paired_speedup(base, spec, category, 3)
    back = stats.paired_speedup(spec, base, category, 3)
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
        found = stats.paired_speedup(
            np.ones(60), ratio, np.repeat([0, 1, 2], 20), 3, n_resamples=400
        )
        hits += found.overall_interval[0] <= 1.7 <= found.overall_interval[1]
    assert 0.90 <= hits / 200 <= 0.99
