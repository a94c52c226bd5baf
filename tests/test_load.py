"""Load: whether a queue grows, held against simulated queues; goodput by hand."""

from __future__ import annotations

import heapq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import store
from speedbench.arrivals import due_ns
from speedbench.columns import Told
from speedbench.limits import parse_limits
from speedbench.open_loop import Arrivals
from speedbench.report.blocks import Facts
from speedbench.report.layout_load import of_load
from speedbench.report.load import Goodput, load_of
from speedbench.report.summary import summarize
from speedbench.store import Run
from speedbench.types import UNKNOWN, ConversationRecord
from tests.builders import MS, S, conversation, manifest, session, stored, turn, write_part

OPEN = {"request_rate": 10.0, "arrivals": "constant"}


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


def every_100_ms(directory: Path, *, lost: range = range(0), refused: range = range(0)) -> Run:
    """A hundred conversations of 40 ms; of those whose number ends with a digit of `lost` no step
    comes, and of those with one of `refused` we refuse the second turn."""
    records = []
    for i in range(100):
        about: dict[str, Any] = {"submitted_ns": i * 100 * MS, "ttft_ns": 40 * MS}
        if i % 10 in lost:
            turns = [turn(f"{i}.0", [], finish="error", error="429", **about)]
        else:
            turns = [turn(f"{i}.0", [1], **about)]
        if i % 10 in refused:
            about = {"submitted_ns": UNKNOWN, "finish": "refused", "error": "too long"}
            turns.append(turn(f"{i}.1", [], number=1, **about))
        records.append(conversation(str(i), "a", *turns))
    return stored(directory, records, draft_length=0, config=OPEN)


def test_what_was_turned_away_came_and_was_not_kept_up_with(tmp_path: Path) -> None:
    found = arrivals(every_100_ms(tmp_path / "r", lost=range(3)))
    assert found.n == 100
    assert found.offered_per_s == pytest.approx(99 / 9.9)
    # Those of numbers 50 to 98 ended between 4.95 and 9.9 s: 49, of which 15 were turned away.
    assert found.completed_per_s == pytest.approx(34 / 4.95)
    assert found.n_most_in_flight == 1
    assert found.is_behind is True


def test_what_we_refused_was_kept_up_with_until_then(tmp_path: Path) -> None:
    found = arrivals(every_100_ms(tmp_path / "r", refused=range(3)))
    assert found.completed_per_s == pytest.approx(49 / 4.95)
    assert found.is_behind is False


@pytest.mark.parametrize(
    ("records", "n", "why"),
    [
        ([], 0, "no conversation came"),
        (
            [turn("a.0", [], finish="refused", error="x", submitted_ns=UNKNOWN)],
            0,
            "no conversation",
        ),
        ([turn("a.0", [], finish="error", error="429")], 1, "no step was recorded"),
    ],
)
def test_an_open_loop_without_a_step_has_a_report(
    tmp_path: Path, records: list[Any], n: int, why: str
) -> None:
    made = [conversation("a", "x", one) for one in records]
    run = stored(tmp_path / "r", made, config={**OPEN, "goodput": "ttft=1s"})
    found = summarize(run).load
    assert found.arrivals is not None
    assert (found.arrivals.n, found.arrivals.is_behind) == (n, None)
    assert why in found.arrivals.why_not
    assert found.goodput is not None
    assert found.goodput.per_s.value is None
    (facts,) = (block for block in of_load(found) if isinstance(block, Facts))
    assert not any("at a time" in text for _, text, _ in facts.items)


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


def chunked(
    directory: Path, n_tokens: list[int], engine_steps: list[int], *, is_whole: bool = True
) -> Run:
    """Chunks 30 ms apart, of which a server told two verifications: of 3 and 4 tokens."""
    made = turn("a.0", n_tokens, engine_steps=engine_steps, step_ns=30 * MS)
    run = stored(directory, [conversation("a", "x", made)])
    told = Told(np.array([0]), np.array([[0, 0, 0, 1, 1]]), np.array([0]), is_whole)
    return replace(run, columns=replace(run.columns, told=told))


def kept(run: Run, text: str) -> Goodput:
    found = load_of(run, parse_limits(text)).goodput
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("n_tokens", "engine_steps", "step_ms"),
    [
        ([4, 4], [2, 1], 30),  # one verification came with the first chunk, one 30 ms later
        ([1, 7], [1, 0], 15),  # both came after it
        ([1, 3, 4], [1, 1, 1], 30),
    ],
)
def test_steps_inside_the_first_chunk_take_no_time_after_it(
    tmp_path: Path, n_tokens: list[int], engine_steps: list[int], step_ms: int
) -> None:
    run = chunked(tmp_path / "r", n_tokens, engine_steps)
    assert kept(run, f"step_time={step_ms}ms").n_met == 1
    assert kept(run, f"step_time={step_ms - 1}ms").n_met == 0
    assert kept(run, f"step_time={step_ms - 1}ms").share.value == 0


@pytest.mark.parametrize(
    ("n_tokens", "engine_steps", "is_whole"),
    [
        ([4, 4], [0, 0], True),  # how many verifications came first is not known
        ([1, 7], [1, 0], False),  # steps without a draft may be missing
        ([8], [0], True),  # all came at once, after a time that nobody knows
        ([8], [3], True),
    ],
)
def test_no_step_time_where_it_is_not_known_how_many_came_later(
    tmp_path: Path, n_tokens: list[int], engine_steps: list[int], is_whole: bool
) -> None:
    found = kept(chunked(tmp_path / "r", n_tokens, engine_steps, is_whole=is_whole), "step_time=1s")
    assert found.share.value is None
    assert "mean time of a decode step is not known" in found.share.why_not


AHEAD = 1000 * S


def two_replicas(directory: Path, clock: str, met_ns: int | None) -> Run:
    """Submitted every half second, in turn by either: 0, 0.5, 1 and 1.5 s after they met. The
    second one's clock is a thousand seconds ahead; each request ends after 90 ms."""
    entries = [
        session(replica=0, clock="boot 1", met_ns=None if met_ns is None else 0),
        session(replica=1, clock=clock, met_ns=met_ns, started_ns=AHEAD, ended_ns=AHEAD + 10 * S),
    ]
    about = manifest(expected={"a": 4}, sessions=entries, config={**OPEN, "goodput": "ttft=1s"})
    store.create(directory)
    store.write_manifest(directory, about)
    for r, ahead in enumerate((0, AHEAD)):
        records: list[ConversationRecord] = []
        for i in (0, 1):
            at = ahead + r * S // 2 + i * S
            made = turn(f"r{r}-{i}.0", [1, 1, 1, 1, 1], submitted_ns=at)
            records.append(conversation(f"{r}-{i}", "a", made))
        write_part(directory, records, 0, r)
    return store.load(directory)


def test_replicas_on_other_clocks_are_counted_from_where_they_met(tmp_path: Path) -> None:
    load = load_of(two_replicas(tmp_path / "r", "boot 2", AHEAD))
    assert load.goodput is not None
    assert load.goodput.per_s.value == pytest.approx(4 / 1.59)
    assert load.goodput.share.value == 1
    assert load.arrivals is not None
    assert load.arrivals.offered_per_s == pytest.approx(3 / 1.5)
    assert load.arrivals.n_most_in_flight == 1


def test_no_rate_without_a_common_clock(tmp_path: Path) -> None:
    run = two_replicas(tmp_path / "r", "boot 2", None)
    load = load_of(run)
    assert load.goodput is not None
    assert load.arrivals is not None
    for why in (load.goodput.per_s.why_not, load.arrivals.why_not):
        assert "no clock in common" in why
    assert load.goodput.per_s.value is None
    assert load.arrivals.offered_per_s is None
    assert load.goodput.share.value == 1  # a request's times are all by one clock
    assert summarize(run).output_tps.value is None


def test_merged_jobs_have_no_goodput_and_no_arrivals(tmp_path: Path) -> None:
    run = two_replicas(tmp_path / "r", "boot 2", AHEAD)
    load = load_of(replace(run, manifest={**run.manifest, "merged": ["x", "y"]}))
    assert load.goodput is not None
    assert load.arrivals is not None
    assert load.goodput.per_s.value is load.goodput.share.value is None
    assert load.arrivals.offered_per_s is load.arrivals.is_behind is None
    for why in (load.goodput.share.why_not, load.goodput.per_s.why_not, load.arrivals.why_not):
        assert "merged" in why


@pytest.mark.parametrize("status", ["partial", "complete"])
def test_no_goodput_where_conversations_were_in_flight_at_the_end(
    tmp_path: Path, status: str
) -> None:
    made = [conversation("a", "x", [1, 2]), conversation("b", "x", [1, 2])]
    about = {"sessions": [session(n_uncommitted=64)], "status": status}
    run = stored(tmp_path / "r", made, config={**OPEN, "goodput": "ttft=1s"}, **about)
    load = load_of(run)
    assert load.goodput is not None
    assert load.arrivals is not None
    assert (load.goodput.n, load.goodput.n_met) == (2, 2)
    assert load.goodput.per_s.value is load.goodput.share.value is None
    for why in (load.goodput.share.why_not, load.goodput.per_s.why_not, load.arrivals.why_not):
        assert "in flight" in why
        assert "not in the records" in why


def test_what_was_asked_again_when_resumed_is_in_the_share(tmp_path: Path) -> None:
    sessions = [session(0, n_uncommitted=1, end="stopped"), session(1)]
    config = {**OPEN, "goodput": "ttft=60ms"}
    first = conversation("a", "x", turn("a.0", [1, 2], submitted_ns=S))
    run = stored(tmp_path / "r", [first], sessions=sessions, config=config, expected={"x": 2})
    again = conversation("b", "x", turn("b.0", [1, 2], submitted_ns=S, ttft_ns=70 * MS))
    write_part(run.directory, [again], 1)
    load = load_of(store.load(run.directory))
    assert load.goodput is not None
    assert load.goodput.share.value == 0.5
    assert load.goodput.per_s.value is None
    assert "resumed" in load.goodput.per_s.why_not
    assert load.arrivals is not None
    assert "resumed" in load.arrivals.why_not


def test_a_clock_that_runs_backwards_tells_no_goodput(tmp_path: Path) -> None:
    made = turn("a.0", [1, 2], times_ns=[2 * S, S])
    found = kept(stored(tmp_path / "r", [conversation("a", "x", made)]), "e2e=5s")
    assert found.share.value is None
    assert "backwards" in found.share.why_not


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=5", "ttft=-5ms", "latency=5ms", "ttft=1s,ttft=2s", "ttft=0ms"]
)
def test_mistaken_limits_are_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=f"--goodput is '{text}'"):
        parse_limits(text)
