"""Load: whether a queue grows, held against simulated queues; goodput by hand."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench.arrivals import due_ns
from speedbench.limits import parse_limits
from speedbench.open_loop import Arrivals
from speedbench.report.load import load_of
from speedbench.store import Run
from tests.builders import MS, S, conversation, stored, turn


def queue(
    directory: Path, *, load: float, n: int = 400, servers: int = 4, seed: int = 1, scale: float = 1
) -> Run:
    """First come, first served, by so many servers that need about a second each: at load 1 as
    much comes as they can do."""
    rng = np.random.default_rng(seed)
    rate = load * servers / scale
    free = [0.0] * servers
    records = []
    for i, due in enumerate(due_ns(rate, n, "poisson", seed) / 1e9):
        begins = max(heapq.heappop(free), due)
        ends = begins + scale * rng.uniform(0.6, 1.4)
        heapq.heappush(free, ends)
        times = [round(begins * 1e9) + 10 * MS, round(ends * 1e9)]
        made = turn(f"{i}.0", [1, 1], submitted_ns=round(due * 1e9), times_ns=times)
        records.append(conversation(str(i), "a", made))
    return stored(
        directory,
        records,
        draft_length=0,
        config={"request_rate": rate, "arrivals": "poisson", "goodput": None},
    )


def arrivals(run: Run) -> Arrivals:
    found = load_of(run).arrivals
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("load", "grows"), [(0.5, False), (0.7, False), (1.4, True), (3.0, True)])
def test_a_growing_queue_is_recognised(tmp_path: Path, seed: int, load: float, grows: bool) -> None:
    found = arrivals(queue(tmp_path / "r", load=load, seed=seed))
    assert found.is_behind is grows
    assert found.offered_per_s == pytest.approx(load * 4, rel=0.25)
    if load > 1:  # no more than the servers can do
        assert found.completed_per_s == pytest.approx(4, rel=0.15)


def test_a_queue_that_outgrows_the_whole_measurement_is_recognised(tmp_path: Path) -> None:
    assert arrivals(queue(tmp_path / "r", load=20, n=200)).is_behind is True


def test_what_lasts_as_long_as_it_was_measured_says_nothing(tmp_path: Path) -> None:
    """A thousand servers, none of which anybody waits for."""
    found = arrivals(queue(tmp_path / "r", load=0.1, n=100, servers=1000))
    assert found.is_behind is None
    assert "lasts more than a quarter" in found.why_not


def test_few_arrivals_say_nothing(tmp_path: Path) -> None:
    found = arrivals(queue(tmp_path / "r", load=0.5, n=12))
    assert found.is_behind is None
    assert "measure more" in found.why_not


def served(directory: Path, **config: Any) -> Run:
    """Three conversations: TTFT 50, 150 and 50 ms; then 4, 4 and no further steps of two tokens,
    10, 10 and 30 ms apart; submitted at 0, 1 and 2 s."""
    made = [
        turn("a.0", [1, 2, 2, 2, 2], submitted_ns=0, ttft_ns=50 * MS),
        turn("b.0", [1, 2, 2, 2, 2], submitted_ns=S, ttft_ns=150 * MS),
        turn("c.0", [1], submitted_ns=2 * S, ttft_ns=50 * MS),
        turn("d.0", [1, 1], submitted_ns=2 * S, finish="error", error="lost"),
    ]
    records = [conversation(t.request_id[0], "x", t) for t in made]
    return stored(directory, records, config=config)


@pytest.mark.parametrize(
    ("limits", "n_met"),
    [
        ("ttft=100ms", 2),
        ("ttft=0.2s", 3),
        ("ttft=50ms,step_time=10ms", 2),  # a limit that is just kept is kept
        ("step_time=9ms", 1),  # only the one that took no step
        ("tpot=5ms", 3),
        ("tpot=4.9ms", 1),
        ("e2e=90ms", 2),
        ("ttft=1ms", 0),
    ],
)
def test_goodput_counts_what_keeps_every_limit(tmp_path: Path, limits: str, n_met: int) -> None:
    found = load_of(served(tmp_path / "r", goodput=limits)).goodput
    assert found is not None
    assert (found.n_met, found.n) == (n_met, 4)  # what failed kept no limit
    assert found.share.value == pytest.approx(n_met / 4)
    assert found.per_s.value == pytest.approx(n_met / 2.06)  # the failed one ended last, at 2.06 s


def test_limits_of_the_report_come_before_those_of_the_run(tmp_path: Path) -> None:
    run = served(tmp_path / "r", goodput="ttft=1ms")
    found = load_of(run, {"ttft": 0.1}).goodput
    assert found is not None
    assert found.n_met == 2


def test_unknown_steps_give_no_goodput_of_step_times(tmp_path: Path) -> None:
    made = turn("a.0", [1, 2, 2], engine_steps=[0, 0, 0])
    run = stored(tmp_path / "r", [conversation("a", "x", made)])
    found = load_of(run, {"step_time": 1.0}).goodput
    assert found is not None
    assert found.per_s.value is None
    assert "mean time of a decode step is not known" in found.per_s.why_not
    known = load_of(run, {"ttft": 1.0, "e2e": 1.0, "tpot": 1.0}).goodput
    assert known is not None
    assert known.n_met == 1


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=5", "ttft=-5ms", "latency=5ms", "ttft=1s,ttft=2s", "ttft=0ms"]
)
def test_mistaken_limits_are_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=f"--goodput is '{text}'"):
        parse_limits(text)
