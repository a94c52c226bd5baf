"""The overhead benchmark's arithmetic, and the null engine it measures with."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.null_paced import HEAD, Pace, Paced, Requests, Unpaced
from speedbench.types import EngineDiedError, Request, Sampling, Step

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import overhead  # noqa: E402
from overhead import Case, Outcome, Session, Spread  # noqa: E402

NAN = float("nan")


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "p"), [(0, 0.7), (1, 0.7), (3, 0.5), (7, 0.9)])
def test_tokens_per_step_is_the_mean_over_all_outcomes(k: int, p: float) -> None:
    mean = 0.0
    for kept in itertools.product((True, False), repeat=k):
        accepted = next((i for i, one in enumerate(kept) if not one), k)
        mean += (1 + accepted) * np.prod([p if one else 1 - p for one in kept])
    assert overhead.tokens_per_step(k, p) == pytest.approx(mean)


def test_gaps_are_within_a_request_only() -> None:
    request = np.array([0, 1, 0, 1, 1, 2])
    time_ns = np.array([10, 11, 25, 31, 61, 100])
    assert overhead.gaps_ns(request, time_ns).tolist() == [15, 20, 30]


def test_median_and_p99() -> None:
    found = Spread.of(np.arange(0, 101) * 1_000_000)
    assert (found.median_ms, found.p99_ms) == (50.0, pytest.approx(99.0))


def test_distortion_is_the_share_by_which_the_record_is_off() -> None:
    assert overhead.distortion(10.1, 10.0) == pytest.approx(0.01)
    assert overhead.distortion(9.0, 10.0) == pytest.approx(-0.1)
    assert np.isnan(overhead.distortion(1.0, 0.0))


def test_own_cost_is_what_the_engine_alone_does_not_take() -> None:
    assert overhead.own_us(3.0, [0.9, 1.1], 1_000_000) == pytest.approx(2.0)


def test_growth_is_of_the_middle_of_what_comes_late_beside_what_comes_early() -> None:
    levels = {0: 10.0, 1: 90.0, 2: 50.0, 3: 60.0, 4: 51.0, 5: 99.0, 6: 52.0, 7: 61.0, 8: 54.0}
    samples = [(100 * n, mib) for n, mib in levels.items()]
    assert overhead.growth_mib(samples) == (61 + 54) / 2 - (60 + 51) / 2
    leaking = [(n, mib + n / 10) for n, mib in samples]
    assert overhead.growth_mib(leaking) == pytest.approx(2 + 40)
    assert np.isnan(overhead.growth_mib(samples[:1]))
    assert np.isnan(overhead.growth_mib([]))


def test_a_paced_case_keeps_the_engine_busy_for_its_seconds() -> None:
    case = Case("speedbench", 256, 0, step_ms=10, seconds=6)
    assert case.tokens == 200  # 2 s of 10 ms steps, a token each
    assert case.n_rows == 768  # three rounds of 256
    long = Case("speedbench", 32, 0, step_ms=2, seconds=120)
    assert (long.tokens, long.n_rows) == (16384, round(32 * 60_000 / 16384))


def test_an_unpaced_case_has_about_its_steps() -> None:
    case = Case("speedbench", 32, 0, output_length=1000, n_steps=100_000)
    assert (case.tokens, case.n_rows) == (1000, 100)
    assert Case("speedbench", 4096, 0, n_steps=1).n_rows == 8192


def test_recorded_times_are_held_against_the_step_they_are_of() -> None:
    """Two requests in four engine steps 10 ms apart, each seen 1, 3, 1, 3 ms late."""
    ms = 1_000_000
    engine = Unpaced(Pace())
    engine.engine_ns.extend(t * ms for t in (100, 110, 120, 130))
    engine.seen_ns.extend(t * ms for t in (101, 113, 121, 133))
    request = np.array([0, 0, 0, 1, 1])
    recorded = np.array([101, 113, 121, 121, 133]) * ms
    submitted, arrived = np.array([90, 105]) * ms, np.array([95, 106]) * ms
    case = Case("speedbench", 2, step_ms=10)
    found = overhead._with_times(
        Outcome(5, 1.0), engine, case, request, recorded, submitted, arrived
    )
    assert found.step.median_ms == 12.0  # of 12, 8 and 12
    assert found.step_true.median_ms == found.period_ms == 10.0
    assert found.ttft.median_ms == 13.5  # 11 and 16
    assert found.ttft_true.median_ms == 9.5  # 5 and 14
    assert found.worst_ms == 3.0
    # The published loop stamps a little after a step was seen, in each request's own time.
    late = recorded + np.array([1, 2, 3, 4, 5]) * 100_000
    published = overhead._with_times(
        Outcome(5, 1.0), engine, Case("published", 2, step_ms=10), request, late, submitted, arrived
    )
    assert published.step_true == found.step_true
    assert published.step.median_ms == pytest.approx(12.1)


def session_of(own_us: float, published_us: float, step: Spread, grown_mib: float) -> Session:
    costs = {
        Case("speedbench", 256): [Outcome(100, 9.0, own_us)],
        Case("speedbench", 256, objects=True): [Outcome(100, 9.0, 3 * own_us)],
        Case("published", 256): [Outcome(100, 9.0, published_us, published_us / 2)],
    }
    times = {
        Case("speedbench", 4096, step_ms=10): Outcome(
            100, 9.0, step=step, step_true=Spread(10.0, 12.0)
        ),
        Case("published", 4096, step_ms=10): Outcome(0, NAN, fault="not done in 300 s"),
    }
    memory = {Case("speedbench", 256): Outcome(10_000_000, 9.0, grown_mib=grown_mib, rss_mib=50)}
    plan = overhead.Plan((*costs,), (*times,), (*memory,), 1)
    return Session(plan, costs, times, memory, "overhead.py", ROOT)


def verdicts(session: Session) -> list[str]:
    return [line.rsplit("|", 2)[1].strip() for line in overhead._targets(session).splitlines()[2:]]


def test_each_target_is_said_to_be_met_or_not() -> None:
    met = session_of(0.9, 9.1, Spread(10.09, 12.1), 5)
    missed = session_of(3.1, 30.0, Spread(10.0, 12.13), 500)
    assert verdicts(met) == ["met"] * 3 + ["**not met**", "met"]  # 3.4 times, handed objects
    assert verdicts(missed) == ["**not met**"] * 5
    page = overhead.page(met)
    assert "not done in 300 s" in page
    assert (
        "1,024 tokens | at least 10 | 10.1; without the streams it is written for 5.1 | met |"
        in page
    )


# --- the engine -----------------------------------------------------------------------------------


def request(name: str, max_tokens: int) -> Request:
    return Request(name, (1, 2), max_tokens, Sampling())


def answers(steps: list[Step]) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for step in steps:
        found.setdefault(step.request_id, []).append(step)
    return found


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_every_answer_has_its_tokens_in_steps_of_at_most_k_and_one(k: int, batches: bool) -> None:
    engine = Unpaced(Pace(k, batches=batches))
    asked = {"a": 1, "b": 17, "c": 64, "d": 500}
    steps: list[Step] = []
    for name, n in asked.items():
        engine.submit(request(name, n))
        steps += engine.poll()
    while engine.n_live:
        steps += engine.poll()
    found = answers(steps)
    assert {name: sum(len(s.token_ids) for s in of) for name, of in found.items()} == asked
    for of in found.values():
        assert len(of[0].token_ids) == 1
        assert all(1 <= len(s.token_ids) <= k + 1 for s in of)
        assert [s.finish_reason for s in of] == [None] * (len(of) - 1) + ["length"]


def test_drafts_are_kept_with_the_probability_that_is_stated() -> None:
    """30,000 decode steps: the mean is within 4 of its standard errors of the closed form."""
    requests = Requests(Pace(3))
    requests.add([(i, 10**6, 0) for i in range(1000)])
    requests.step()
    counts = []
    for _ in range(30):
        message = requests.step()
        _, n, _ = HEAD.unpack_from(message)
        counts += np.frombuffer(message, np.int32, n, HEAD.size + 4 * n).tolist()
    error = np.std(counts) / len(counts) ** 0.5
    assert np.mean(counts) == pytest.approx(overhead.tokens_per_step(3), abs=4 * error)


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("stamps", ["engine", "arrival"])
def test_a_paced_engine_steps_by_itself_and_keeps_its_own_stamps(
    stamps: str, batches: bool
) -> None:
    engine = Paced(Pace(1, 2_000_000, 1_000_000, stamps, batches=batches))  # type: ignore[arg-type]
    try:
        for i in range(3):
            engine.submit(request(f"r{i}", 20))
        steps: list[Step] = []
        while engine.n_live:
            steps += engine.poll()
    finally:
        engine.close()
    assert {n: sum(len(s.token_ids) for s in of) for n, of in answers(steps).items()} == {
        "r0": 20, "r1": 20, "r2": 20
    }  # fmt: skip
    own, seen = list(engine.engine_ns), list(engine.seen_ns)
    assert own == sorted(own)
    assert all(s > o for o, s in zip(own, seen, strict=True))  # nothing is seen before it is made
    chosen = own if stamps == "engine" else seen
    assert {step.time_ns for step in steps} == set(chosen)
    first = {name: of[0].time_ns for name, of in answers(steps).items()}
    assert all(first[name] - engine.arrived_ns[name] >= 1_000_000 for name in first)


def test_a_process_that_is_gone_is_a_dead_engine() -> None:
    engine = Paced(Pace(0, 1_000_000))
    engine._process.kill()
    engine._process.join()
    engine.submit(request("a", 5))  # which does not raise: the poll tells
    with pytest.raises(EngineDiedError, match="gone"):
        engine.poll()
    engine.close()


# --- both harnesses -------------------------------------------------------------------------------


def test_the_loop_and_the_store_are_measured_over_every_step(tmp_path: Path) -> None:
    case = Case("speedbench", 8, 2, output_length=50, n_steps=500)
    found = overhead.measure_ours(case, tmp_path / "r")
    _, n_steps = overhead.drained(case)
    assert found.n_steps == n_steps
    assert len(overhead._stored(tmp_path / "r")[0]) == n_steps


def test_a_paced_run_is_held_against_the_engine(tmp_path: Path) -> None:
    case = Case("speedbench", 4, 1, step_ms=2, seconds=0.2, stamps="engine")
    found = overhead.measure_ours(case, tmp_path / "r")
    assert found.step == found.step_true
    assert found.ttft.median_ms >= found.ttft_true.median_ms  # submitted before it arrived


def test_streams_hand_every_reader_all_its_tokens() -> None:
    streams = overhead.Streams(Unpaced(Pace(3, batches=False)), 40)

    async def read(name: str) -> list[int]:
        return [len(item.token_ids) async for item in streams.generate(request_id=name)]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*(read(f"r{i}") for i in range(5)))

    for lengths in asyncio.run(read_all()):
        assert lengths[0] == 1
        assert lengths[-1] == 40
        assert all(1 <= b - a <= 4 for a, b in itertools.pairwise(lengths))
