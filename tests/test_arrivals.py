"""Arrivals: their rate, their law, and that a seed gives the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from speedbench.arrivals import due_ns


def test_constant_arrivals_are_evenly_apart() -> None:
    assert due_ns(4, 4, "constant", seed=1).tolist() == [0, 250_000_000, 500_000_000, 750_000_000]


def test_poisson_gaps_are_exponential_with_the_rates_mean() -> None:
    due = due_ns(50, 20_000, "poisson", seed=3)
    gaps_s = np.diff(due) / 1e9
    assert due[0] == 0
    # The mean of n exponential gaps has a standard error of mean / sqrt n: four are allowed.
    assert gaps_s.mean() == pytest.approx(1 / 50, rel=4 / np.sqrt(len(gaps_s)))
    assert stats.kstest(gaps_s, "expon", args=(0, 1 / 50)).pvalue > 1e-4


def test_a_seed_gives_the_same_arrivals_and_another_gives_others() -> None:
    first, again, other = (due_ns(10, 50, "poisson", seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    # More rows do not move the first ones.
    assert due_ns(10, 80, "poisson", 1)[:50].tolist() == first.tolist()


@pytest.mark.parametrize("process", ["poisson", "constant"])
def test_nothing_is_due_after_the_duration(process: str) -> None:
    every = due_ns(10, 100, process, 1)  # type: ignore[arg-type]
    some = due_ns(10, 100, process, 1, duration_s=2.0)  # type: ignore[arg-type]
    assert some.tolist() == [due for due in every.tolist() if due < 2_000_000_000]
    assert 0 < len(some) < len(every)


def test_no_row_is_due_without_rows() -> None:
    assert due_ns(10, 0, "poisson", 1).tolist() == []
