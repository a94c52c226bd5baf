"""The simulation behind docs/coverage.md: its world is what it says, and it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speedbench import metrics

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import coverage  # noqa: E402


def test_requests_decode_all_their_tokens_and_only_last_steps_are_cut() -> None:
    tokens = np.array([1, 7, 50, 599])
    steps = coverage.decode(np.random.default_rng(1), np.full(4, 0.8), tokens)
    whole, cut = steps[:, :5], steps[:, 5:]
    assert ((whole + cut) @ np.arange(5)).tolist() == tokens.tolist()
    assert (cut.sum(axis=1) <= 1).all()
    assert (whole[:, 0] == 0).all()
    assert (cut[:, [0, 4]] == 0).all()


def test_the_law_of_acceptance_is_the_one_that_is_stated() -> None:
    """AL = 1 + p + p^2 + p^3, whatever the ends of requests cut off."""
    steps = coverage.decode(np.random.default_rng(2), np.full(20000, 0.7), np.full(20000, 25)).sum(
        axis=0
    )
    al = metrics.acceptance_length(steps[:5], steps[5:])
    assert float(al) == pytest.approx(sum(0.7**k for k in range(4)), rel=0.005)


def test_alike_arms_have_a_true_ratio_of_exactly_one() -> None:
    true = coverage.truth(1, coverage.Scenario("alike", (0.0, 0.0)), 50)
    for name in ("user-TPS speedup", "AL ratio", "step-time ratio", "predicted speedup"):
        assert (true[name] == 1).all()
    slower = coverage.truth(1, coverage.Scenario("", (0.0, 0.0), 2.0), 50)
    assert slower["user-TPS speedup"] == pytest.approx(np.full(12, 0.5))


def test_share_of_intervals_that_hold_the_truth() -> None:
    intervals = np.array([[0.0, 1.0], [2.0, 3.0], [np.nan, np.nan], [0.5, 0.9]])
    assert coverage.held(intervals, 0.7) == pytest.approx(2 / 3)


def test_it_writes_its_page() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/coverage.py", "--quick"],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    for title in (
        "# Coverage",
        "## Intervals",
        "## Repeats",
        "## Gates",
        "## Smallest differences",
    ):
        assert f"\n{title}" in f"\n{done.stdout}"
    overall = [
        float(line.split("|")[4].split()[0])
        for line in done.stdout.splitlines()
        if "| user-TPS speedup |" in line
    ]
    assert len(overall) == 12
    assert min(overall) > 80  # of 40 intervals, 38 on average
