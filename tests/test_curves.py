"""Curves: every drawn point against a count by hand over all records."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedbench import metrics, store
from speedbench.report.curves import Timeline, distribution, timeline
from speedbench.report.summary import summarize
from speedbench.store import Run
from tests.builders import MS, S, conversation, session, stored, turn, write_part


@given(st.lists(st.integers(0, 50), max_size=400), st.integers(1, 120))
def test_points_of_a_distribution_are_shares_of_all_values(values: list[int], n: int) -> None:
    found = distribution(np.array(values, float), n)
    assert len(found.values) <= n + 1
    for value, share in zip(found.values, found.shares, strict=True):
        assert value in values
        assert share == sum(v <= value for v in values) / len(values)
    assert list(found.values) == sorted(set(found.values))
    if values:
        assert (found.values[0], found.values[-1]) == (min(values), max(values))
        assert found.shares[-1] == 1
        if n >= len(values):
            assert set(found.values) == set(values)
        # Thinned: no more than two ranks' worth of values lie between neighbours.
        gaps = np.diff([0.0, *found.shares])
        jumps = [sum(v == value for v in values) / len(values) for value in found.values]
        assert all(
            g <= j + 1 / n + 1 / len(values) + 1e-12 for g, j in zip(gaps, jumps, strict=True)
        )
    else:
        assert found.values == ()


def made_at_random(directory: Path, seed: int, **about: object) -> Run:
    """Three slots, several turns each, steps of every length at any time."""
    rng = random.Random(seed)
    records = []
    for c in range(14):
        turns, now = [], rng.randrange(0, 3 * S)
        for t in range(rng.randint(1, 3)):
            n = rng.randint(1, 9)
            times = sorted(rng.sample(range(now + 1, now + 2 * S), n))
            turns.append(turn(f"{c}.{t}", [1, *(rng.randint(1, 4) for _ in range(n - 1))], number=t,
                              submitted_ns=now, times_ns=times))  # fmt: skip
            now = times[-1] + rng.randrange(1, S)
        records.append(conversation(f"c{c}", "abc"[c % 3], *turns))
    return stored(
        directory,
        records,
        sessions=[session(started_ns=0, ended_ns=13 * S)],
        config={"concurrency": 3},
        **about,
    )


def by_hand(run: Run, found: Timeline) -> None:
    """Every number by walking over all requests, nanosecond intervals kept as whole numbers."""
    columns = run.columns
    edges = [round(e * 1e9) for e in found.edges_s]
    for b, (begin, end) in enumerate(pairwise(edges)):
        requests = tokens = put_out = 0
        for r in range(columns.n_requests):
            mine = columns.request == r
            times, lengths = columns.time_ns[mine].tolist(), columns.n_tokens[mine].tolist()
            submitted = int(columns.submitted_ns[r])
            held = int(columns.n_prompt_tokens[r])
            moments = [submitted, *times]
            for i, until in enumerate(times):
                overlap = max(0, min(until, end) - max(moments[i], begin))
                requests += overlap
                tokens += overlap * held
                held += lengths[i]
            put_out += sum(n for at, n in zip(times, lengths, strict=True)
                           if begin < at <= end or (b == 0 and at <= begin))  # fmt: skip
        width = end - begin
        assert found.requests[b] == pytest.approx(requests / width, abs=1e-6)
        assert found.tokens[b] == pytest.approx(tokens / width, abs=1e-4)
        assert found.output_tps[b] == pytest.approx(put_out / width * 1e9, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_in_flight_by_walking_over_all_requests(tmp_path: Path, seed: int) -> None:
    run = made_at_random(tmp_path / "r", seed)
    found = timeline(run.columns, 0, [metrics.Span(0, 0, 13 * S)], 3, 10)
    assert (found.edges_s[0], found.edges_s[-1], len(found.edges_s)) == (0, 13, 11)
    by_hand(run, found)
    assert sum(found.output_tps) * 1.3 == pytest.approx(int(run.columns.n_tokens.sum()))


def test_replicas_are_drawn_on_one_clock(tmp_path: Path) -> None:
    """The second replica's clock is 100 s ahead; together they hold two requests for 1 s of 2."""
    first = conversation("a", "x", turn("a", [1, 1], submitted_ns=0, times_ns=[S // 2, S]))
    run = stored(tmp_path / "r", [first])
    late = 100 * S
    second = conversation(
        "b", "x", turn("b", [1, 1], submitted_ns=late, times_ns=[late + S // 4, late + S])
    )
    write_part(run.directory, [second], replica=1)
    both = store.load(run.directory)
    spans = [metrics.Span(0, 0, 2 * S), metrics.Span(1, late, late + 2 * S, late)]
    found = timeline(both.columns, 0, spans, 1, 2)
    assert found.requests == pytest.approx((2, 0))
    assert found.output_tps == pytest.approx((4, 0))
    # 5 prompt tokens each; the first token of each is held for 1/2 s and 3/4 s.
    assert found.tokens == pytest.approx((10 + 0.5 + 0.75, 0))


def test_the_window_marked_is_the_one_that_is_measured(tmp_path: Path) -> None:
    run = made_at_random(tmp_path / "r", 5)
    found = summarize(run).curves.timeline
    assert found is not None
    assert found.steady_s is not None
    starts = sorted(
        int(run.columns.submitted_ns[r])
        for r in range(run.columns.n_requests)
        if run.columns.turn[r] == 0
    )
    assert found.steady_s == pytest.approx((starts[2] / 1e9, starts[-1] / 1e9), abs=1e-9)
    assert summarize(run).steady_duration_s == pytest.approx((starts[-1] - starts[2]) / 1e9)


def test_nothing_is_drawn_over_time_where_nothing_is_known(tmp_path: Path) -> None:
    rows = [conversation("a", "x", [1, 2, 3])]
    resumed = stored(tmp_path / "a", rows, sessions=[session(0), session(1)])
    curves = summarize(resumed).curves
    assert curves.timeline is None
    assert curves.why_no_timeline == "throughput is not pooled over 2 sessions"
    none = stored(tmp_path / "b", [], sessions=[], expected={"x": 1})
    assert summarize(none).curves.step_time_s.values == ()


def test_times_drawn_are_the_times_measured(tmp_path: Path) -> None:
    rows = [
        conversation(
            f"c{i}", "x", turn(f"c{i}", [1] * 4, ttft_ns=(10 + i) * MS, step_ns=(5 + i % 2) * MS)
        )
        for i in range(4)
    ]
    curves = summarize(stored(tmp_path / "r", rows)).curves
    assert curves.ttft_s.values == pytest.approx((0.010, 0.011, 0.012, 0.013))
    assert curves.ttft_s.shares == (0.25, 0.5, 0.75, 1)
    assert curves.step_time_s.values == pytest.approx((0.005, 0.006))
    assert curves.step_time_s.shares == (0.5, 1)
