"""Numbers from records: hand-computed cases, an independent twin, and simulated truth."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from speedbench import metrics, store
from speedbench.columns import Columns
from speedbench.report.summary import Summary, summarize
from speedbench.store import Run
from tests.builders import (
    MS,
    S,
    conversation,
    counters,
    manifest,
    session,
    stored,
    told,
    turn,
    write_part,
)

# --- the estimator --------------------------------------------------------------------------------


def twin(steps: list[tuple[int, bool]], k: int) -> tuple[list[Fraction | None], Fraction | None]:
    """Kaplan-Meier in plain fractions: (length, censored) -> conditional rates, acceptance length.

    Walks position by position over the steps that are still in play, as one would by hand.
    """
    rates: list[Fraction | None] = []
    for position in range(1, k + 1):
        tried = passed = 0
        for length, censored in steps:
            if length > position:
                tried, passed = tried + 1, passed + 1
            elif length == position and not censored:
                tried += 1
        rates.append(Fraction(passed, tried) if tried else None)
    if not steps:
        return rates, None
    total = surviving = Fraction(1)
    for rate in rates:
        if surviving == 0:
            break
        if rate is None:
            return rates, None
        surviving *= rate
        total += surviving
    return rates, total


@st.composite
def censored_steps(draw: st.DrawFn) -> tuple[int, list[tuple[int, bool]]]:
    k = draw(st.integers(1, 6))
    whole = st.tuples(st.integers(1, k + 1), st.just(False))
    cut = st.tuples(st.integers(1, k), st.just(True))
    return k, draw(st.lists(st.one_of(whole, whole, cut), max_size=25))


@given(censored_steps())
@settings(max_examples=300, deadline=None)
def test_estimator_against_its_twin(case: tuple[int, list[tuple[int, bool]]]) -> None:
    k, steps = case
    length = np.array([n for n, _ in steps], np.int64)
    censored = np.array([c for _, c in steps], bool)
    whole, cut = metrics.count_lengths(np.zeros(len(steps), np.int64), length, censored, 1, k)
    rates, expected = twin(steps, k)
    found = metrics.conditional_rates(whole[0], cut[0])
    assert found.shape == (k,)
    for rate, value in zip(rates, found, strict=True):
        assert np.isnan(value) if rate is None else value == pytest.approx(float(rate), abs=1e-12)
    al = metrics.acceptance_length(whole[0], cut[0])
    assert np.isnan(al) if expected is None else al == pytest.approx(float(expected), abs=1e-12)


def test_a_cut_step_counts_only_where_it_was_seen_to_pass() -> None:
    """K=3: whole 1, 2, 4; one cut at 2. Position 1: 3 of 4 pass; 2: 1 of 2; 3: 1 of 1."""
    whole, cut = np.array([0, 1, 1, 0, 1]), np.array([0, 0, 1, 0, 0])
    assert metrics.conditional_rates(whole, cut).tolist() == [0.75, 0.5, 1.0]
    assert metrics.acceptance_length(whole, cut) == 1 + 0.75 + 0.375 + 0.375


def test_a_missing_length_shifts_no_later_position() -> None:
    """Trap 5: only lengths 1 and 4 occur; positions 2 and 3 are always passed."""
    whole = np.array([0, 3, 0, 0, 1])
    none = np.zeros(5, np.int64)
    assert metrics.conditional_rates(whole, none).tolist() == [0.25, 1.0, 1.0]
    assert metrics.published_rates(whole).tolist() == [0.25, 1.0, 1.0]


def test_joint_rate_stays_zero_beyond_a_position_that_nothing_passed() -> None:
    """All steps are of length 1: later rates are unknown, and do not matter."""
    whole = np.array([0, 7, 0, 0, 0])
    rates = metrics.conditional_rates(whole, np.zeros(5, np.int64))
    assert rates[0] == 0
    assert np.isnan(rates[1:]).all()
    assert metrics.joint_rates(rates).tolist() == [0.0, 0.0, 0.0]
    assert metrics.acceptance_length(whole, np.zeros(5, np.int64)) == 1.0


def test_joint_rate_is_zero_under_resampling_weights_too() -> None:
    """0.1 three times and 0.3 differ in floating point: no rest of that may pass a position."""
    whole = np.array([[0.1, 0, 0], [0.1, 0, 0], [0.1, 0, 0]])
    counts = np.concatenate([np.zeros((3, 1)), whole], axis=1).sum(axis=0)
    assert metrics.conditional_rates(counts, np.zeros(4))[0] == 0.0


def test_unknown_rate_makes_the_length_unknown_and_keeps_what_is_known() -> None:
    """K=2: nothing is known beyond a cut at 2, so position 2 has no rate."""
    whole, cut = np.array([0, 1, 0, 0]), np.array([0, 0, 1, 0])
    rates = metrics.conditional_rates(whole, cut)
    assert rates[0] == 0.5
    assert np.isnan(rates[1])
    assert np.isnan(metrics.acceptance_length(whole, cut))


# --- simulated truth ------------------------------------------------------------------------------


def simulate(
    n_requests: int, n_tokens: int, k: int, p: float, seed: int
) -> tuple[Columns, NDArray[np.int64], NDArray[np.bool_]]:
    """Requests of exactly `n_tokens` tokens as a greedy engine would decode them.

    Returns their columns, and apart from those the true (D,) lengths as shown of all decode
    steps, with whether the end of the request cut them.
    """
    rng = np.random.default_rng(seed)
    coins = rng.random((n_requests, n_tokens, k)) < p
    true = 1 + np.cumprod(coins, axis=2).sum(axis=2)
    end = 1 + np.cumsum(true, axis=1)  # the prefill makes one token
    start = end - true
    happens = start < n_tokens
    shown = np.minimum(true, n_tokens - start)
    is_cut = (shown < true)[happens]
    lengths = np.concatenate([np.ones((n_requests, 1), np.int64), shown], axis=1)
    happens = np.concatenate([np.ones((n_requests, 1), bool), happens], axis=1)
    request, step = np.nonzero(happens)
    n = len(request)
    zero, unknown = np.zeros(n_requests, np.int64), np.full(n, -1)
    columns = Columns(
        categories=("only",),
        conversation_ids=tuple(map(str, range(n_requests))),
        category=zero,
        failed=zero.astype(bool),
        conversation=np.arange(n_requests),
        session=zero,
        replica=zero,
        turn=zero,
        n_prompt_tokens=zero,
        submitted_ns=zero,
        finished=~zero.astype(bool),
        request=request,
        step=step,
        time_ns=np.arange(n),
        engine_steps=np.ones(n, np.int64),
        n_tokens=lengths[request, step],
        accepted=unknown,
        drafted=unknown,
    )
    return columns, shown[happens[:, 1:]], is_cut


def true_al(k: int, p: float) -> float:
    return sum(p**i for i in range(k + 1))


@pytest.mark.parametrize("k", [3, 4, 5, 6, 7])
@pytest.mark.parametrize(("n_tokens", "n_requests"), [(10, 60000), (40, 12000), (200, 2500)])
def test_estimator_is_within_half_a_percent_of_the_truth(
    k: int, n_tokens: int, n_requests: int
) -> None:
    columns, _, _ = simulate(n_requests, n_tokens, k, 0.9, seed=k * 1000 + n_tokens)
    counts = metrics.acceptance(columns, k)
    found = metrics.acceptance_lengths(counts, np.ones((1, n_requests)))["al"].overall[0]
    assert found == pytest.approx(true_al(k, 0.9), rel=0.005)


def test_what_counting_or_dropping_cut_steps_would_cost() -> None:
    """Trap 2 at answers of 10 tokens (9 after the prefill), K=7, p=0.9: -29 % and -8 %.

    DESIGN's 22 % is the mean per request at 10 tokens after the prefill.
    """
    columns, shown, _ = simulate(60000, 10, 7, 0.9, seed=3)
    truth = true_al(7, 0.9)
    assert shown.mean() / truth - 1 == pytest.approx(-0.29, abs=0.01)
    short_last = columns.is_last()[columns.step > 0] & (shown < 8)
    assert shown[~short_last].mean() / truth - 1 == pytest.approx(-0.08, abs=0.01)
    counts = metrics.acceptance(columns, 7)
    once = metrics.acceptance_lengths(counts, np.ones((1, 60000)))
    assert once["al"].overall[0] > 1.35 * shown.mean()
    columns, shown, _ = simulate(60000, 11, 7, 0.9, seed=4)
    n_steps = np.bincount(columns.request[columns.step > 0])
    assert (10 / n_steps).mean() / truth - 1 == pytest.approx(-0.22, abs=0.01)


def test_drafts_cut_short_by_the_end_are_no_rejections() -> None:
    """An engine that drafts no more than may still be shown, and tells so: K=7, p=0.9, 10 tokens.

    Taken as they look, its short last drafts understate the acceptance length by a quarter.
    """
    columns, _, _ = simulate(60000, 10, 7, 0.9, seed=5)
    before = np.cumsum(columns.n_tokens) - columns.n_tokens
    first, _ = columns.first_and_last()
    remaining = 10 - (before - before[first][columns.request])
    drafted = np.where(columns.step == 0, 0, np.minimum(7, remaining - 1))
    accepted = np.minimum(np.maximum(columns.n_tokens - 1, 0), drafted)
    told = replace(columns, drafted=drafted, accepted=accepted)

    def al(cut_short: NDArray[np.bool_] | None) -> float:
        counts = metrics.acceptance(told, 7, cut_short)
        return float(metrics.acceptance_lengths(counts, np.ones((1, 60000)))["al"].overall[0])

    truth = true_al(7, 0.9)
    assert al(None) / truth < 0.75
    assert al(metrics.drafts_cut_short(told, 7, 10, False)) == pytest.approx(truth, rel=0.005)
    # Of a lookup only the plain step for the very last token is one that was cut short.
    lookup = metrics.drafts_cut_short(told, 7, 10, True)
    assert lookup.sum() == ((drafted == 0) & (columns.step > 0)).sum() > 0
    assert not metrics.drafts_cut_short(told, 7, 11, True).any()


# --- acceptance lengths of stored runs ------------------------------------------------------------


def test_prefill_and_cut_steps_are_no_rejections(tmp_path: Path) -> None:
    """Trap 2. K=3, every draft accepted, 7 tokens: 1 + 4 + 2 (cut). AL is 4, not 7/3."""
    run = stored(tmp_path / "r", [conversation(f"c{i}", "a", [1, 4, 2]) for i in range(3)])
    summary = summarize(run)
    assert summary.lengths["al"].value == 4.0
    assert summary.lengths["al_specdec_bench"].value == pytest.approx(7 / 3)
    assert summary.histogram == (0, 3, 0, 3)
    assert summary.n_censored == 3
    assert summary.published_histogram == (3, 3, 0, 3)


def test_an_accepted_count_that_is_told_replaces_what_the_end_cut(tmp_path: Path) -> None:
    """The final step shows 2 tokens and the engine accepted 2 drafts: its length is 3."""
    lengths = [1, 4, 2]
    turns = [turn(f"{i}", lengths, told=told(lengths, 3, last=2)) for i in range(2)]
    run = stored(tmp_path / "r", [conversation(f"c{i}", "a", t) for i, t in enumerate(turns)])
    summary = summarize(run)
    assert summary.histogram == (0, 0, 2, 2)
    assert summary.n_censored == 0
    assert summary.lengths["al"].value == 3.5


def test_a_short_final_step_whose_few_drafts_were_all_accepted_is_whole(tmp_path: Path) -> None:
    """Two tokens of one draft: nothing was cut, although K is 3 and no acceptance is told."""
    record = turn("r", [1, 4, 2], told=[(0, 0), (3, 3), (-1, 1)])
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", record)]))
    assert summary.n_censored == 0
    assert summary.lengths["al"].value == 3.0


def test_a_conversation_without_decode_step_is_missing_never_one(tmp_path: Path) -> None:
    """Trap 3: an answer of one token says nothing of acceptance."""
    records = [conversation("one", "a", [1]), conversation("two", "a", [1, 3, 4])]
    summary = summarize(stored(tmp_path / "r", records))
    assert summary.lengths["al"].value == 3.5
    assert summary.lengths["al_conversation"].value == 3.5
    alone = summarize(stored(tmp_path / "alone", records[:1]))
    assert alone.lengths["al"].value is None
    assert "no single decode step" in alone.lengths["al"].why_not


def test_a_length_only_reached_by_cut_steps_is_unknown_with_its_reason(tmp_path: Path) -> None:
    """K=3, one request 1 + 1 + 2(cut): position 1 is known to be passed once in two."""
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", [1, 1, 2])]))
    assert summary.lengths["al"].value is None
    assert "cut off" in summary.lengths["al"].why_not
    assert summary.rates[0].value == 0.5
    assert [r.value for r in summary.rates[1:]] == [None, None]
    assert summary.rates[1].why_not


def test_the_mean_over_categories_names_the_category_it_lacks(tmp_path: Path) -> None:
    records = [conversation("c", "known", [1, 2, 4]), conversation("d", "silent", [1])]
    summary = summarize(stored(tmp_path / "r", records))
    assert summary.lengths["al"].value is None
    assert "category silent" in summary.lengths["al"].why_not
    assert summary.lengths["al_step"].value == 3.0


def test_weights_of_the_named_lengths(tmp_path: Path) -> None:
    """Category a: steps 4, 4, 4 and (another conversation) 1; category b: one step of 2.

    Final steps are uncut because the engine tells what it accepted.
    """
    records = [
        conversation("a0", "a", turn("a0", [1, 4, 4, 4], told=told([1, 4, 4, 4], 3))),
        conversation("a1", "a", turn("a1", [1, 1], told=told([1, 1], 3))),
        conversation("b0", "b", turn("b0", [1, 2], told=told([1, 2], 3))),
    ]
    lengths = summarize(stored(tmp_path / "r", records)).lengths
    assert lengths["al"].value == pytest.approx((13 / 4 + 2) / 2)
    assert lengths["al_step"].value == pytest.approx(15 / 5)
    assert lengths["al_conversation"].value == pytest.approx(((4 + 1) / 2 + 2) / 2)
    assert lengths["al_specdec_bench"].value == pytest.approx((13 / 4 + 2 / 2 + 3 / 2) / 3)


def test_what_was_not_drafted_was_not_rejected(tmp_path: Path) -> None:
    """K = 3, but only one token drafted in three steps of four, and accepted: nothing failed.

    The acceptance length counts tokens per step all the same: (2 + 2 + 2 + 4) / 4.
    """
    told = [(0, 0), (1, 1), (1, 1), (1, 1), (3, 3)]
    records = [conversation(f"c{i}", "qa", [1, 2, 2, 2, 4], told=told) for i in range(2)]
    summary = summarize(stored(tmp_path / "r", records))
    assert [figure.value for figure in summary.rates] == [1, 1, 1]
    assert summary.lengths["al"].value == pytest.approx(2.5)
    assert summary.lengths["al_drafted"].value == pytest.approx(2.5)


def test_plain_steps_are_decode_steps_but_not_drafted_ones(tmp_path: Path) -> None:
    """An n-gram miss: AL 2 over decode steps, 3 over verify steps, hit rate a half."""
    record = turn("r", [1, 1, 4, 1, 2], told=[(0, 0), (0, 0), (3, 3), (0, 0), (1, 3)])
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", record)]))
    assert summary.lengths["al"].value == 2.0
    assert summary.lengths["al_drafted"].value == 3.0
    assert summary.draft_hit_rate.value == 0.5
    assert summary.rates_over == "verify steps"
    assert summary.rates[0].value == 1.0


def test_rates_fall_back_to_decode_steps_unless_every_step_is_told(tmp_path: Path) -> None:
    """One step of four is not told: those told to be verify steps are not all there are."""
    record = turn("r", [1, 1, 4, 4, 4], told=[(0, 0), (-1, -1), (3, 3), (3, 3), (3, 3)])
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", record)]))
    assert summary.rates_over.startswith("decode steps")
    assert summary.rates[0].value == 0.75
    assert summary.lengths["al_drafted"].value is None
    assert summary.draft_hit_rate.value is None


def test_without_speculation_the_length_is_exactly_one(tmp_path: Path) -> None:
    records = [conversation(f"c{i}", "a", [1] * (i + 2)) for i in range(3)]
    summary = summarize(stored(tmp_path / "r", records, draft_length=0))
    assert summary.lengths["al"].value == 1.0
    assert summary.lengths["al_specdec_bench"].value == 1.0
    assert summary.rates == ()
    silent = summarize(stored(tmp_path / "s", [conversation("c", "a", [1])], draft_length=0))
    assert silent.lengths["al"].value is None


def test_merged_events_are_never_counted_as_steps(tmp_path: Path) -> None:
    """Trap 4: an event of two engine steps, one of who knows how many, one longer than K+1."""
    record = turn("r", [1, 4, 3, 2, 9, 4], engine_steps=[1, 1, 2, 0, 1, 1])
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", record)]))
    assert summary.histogram == (0, 0, 0, 2)
    assert summary.kinds["merged"] == 3
    assert summary.lengths["al"].value == 4.0
    assert summary.timing["step_time_s"] is not None
    assert summary.timing["step_time_s"]["n"] == 2
    assert summary.published_histogram == (1, 1, 1, 2, 0, 0, 0, 0, 1)


def test_a_claim_beyond_the_draft_length_is_in_no_histogram(tmp_path: Path) -> None:
    """Trap 12 seen from below: accepted 7 with K=3. It must not spill into another category."""
    liar = turn("r", [1, 4, 4], told=[(0, 0), (3, 3), (7, 8)])
    honest = turn("s", [1, 2, 2], told=told([1, 2, 2], 3))
    records = [conversation("c", "a", liar), conversation("d", "b", honest)]
    summary = summarize(stored(tmp_path / "r", records))
    assert [row.lengths["al"].value for row in summary.categories] == [4.0, 2.0]
    assert summary.kinds["merged"] == 1


def test_failed_conversations_are_missing_rows(tmp_path: Path) -> None:
    """Nine good ones of length 2, one that failed after steps of 4: 9/10, AL 2."""
    good = [
        conversation(f"c{i}", "a", turn(f"c{i}", [1, 2, 2], told=told([1, 2, 2], 3)))
        for i in range(9)
    ]
    bad = conversation(
        "bad",
        "a",
        turn("bad.0", [1, 4, 4], told=told([1, 4, 4], 3)),
        turn("bad.1", [1, 4], number=1, finish="error", error="out of memory"),
    )
    summary = summarize(stored(tmp_path / "r", [*good, bad], config={"output_length": 9}))
    (row,) = summary.categories
    assert (row.n_complete, row.n_expected) == (9, 10)
    assert summary.n_failed == 1
    assert summary.lengths["al"].value == 2.0
    assert summary.histogram == (0, 18, 0, 0)
    assert summary.published_histogram == (9, 18, 0, 0)
    assert summary.timing["e2e_s"] is not None
    assert summary.timing["e2e_s"]["n"] == 9


def test_a_retried_conversation_counts_once(tmp_path: Path) -> None:
    """Session 0 failed with steps of 4, session 1 succeeded with steps of 2."""
    failed = conversation("c", "a", turn("s0-0.0", [1, 4, 4], finish="error", error="died"))
    again = conversation("c", "a", turn("s1-0.0", [1, 2, 2, 4]))
    other = conversation("d", "a", turn("s0-1.0", [1, 2, 2, 4]))
    run = stored(
        tmp_path / "r", [failed, other], expected={"a": 2}, sessions=[session(0), session(1)]
    )
    write_part(run.directory, [again], number=1)
    run = store.load(run.directory)
    summary = summarize(run)
    assert run.n_retried == 1
    assert summary.n_failed == 0
    assert (summary.categories[0].n_complete, summary.categories[0].n_expected) == (2, 2)
    assert summary.histogram == (0, 4, 0, 2)
    assert summary.lengths["al"].value == pytest.approx(16 / 6)


def test_the_engines_own_length(tmp_path: Path) -> None:
    sessions = [session(0, counters=counters(4, 6)), session(1, counters=counters(6, 9))]
    run = stored(tmp_path / "r", [conversation("c", "a", [1, 4])], sessions=sessions)
    assert summarize(run).lengths["al_engine"].value == 1 + 15 / 10


@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=15, deadline=None)
def test_sums_that_must_hold(conversations: list[list[list[int]]]) -> None:
    """Histogram sum = decode steps; tokens = sum of steps; 1 <= AL <= K+1; survival monotone."""
    records = [conversation(f"c{i}", "ab"[i % 2], *turns) for i, turns in enumerate(conversations)]
    with tempfile.TemporaryDirectory() as folder:
        run = stored(Path(folder) / "r", records)
    summary = summarize(run)
    requests = [lengths for turns in conversations for lengths in turns]
    assert sum(summary.histogram) == sum(len(lengths) - 1 for lengths in requests)
    assert summary.n_output_tokens == sum(map(sum, requests))
    assert sum(n * count for n, count in enumerate(summary.published_histogram, 1)) == sum(
        map(sum, requests)
    )
    assert summary.n_requests == len(requests)
    lengths = [summary.lengths[name].value for name in ("al", "al_step", "al_conversation")]
    assert all(value is None or 1 <= value <= 4 for value in lengths)
    joint = [f.value for f in summary.joint if f.value is not None]
    assert joint == sorted(joint, reverse=True)


# --- time -----------------------------------------------------------------------------------------


def timing(summary: Summary, name: str) -> dict[str, float | None]:
    found = summary.timing[name]
    assert found is not None
    return dict(found)


def test_step_time_leaves_out_the_wait_for_the_prefill(tmp_path: Path) -> None:
    """Trap 6: five seconds of queueing and prefill, then steps of 10 and 30 ms."""
    records = [
        conversation(
            f"c{i}",
            "a",
            turn(
                f"c{i}",
                [1, 4, 4],
                submitted_ns=i * MS,
                times_ns=[5 * S, 5 * S + 10 * MS, 5 * S + 40 * MS],
            ),
        )
        for i in range(2)
    ]
    summary = summarize(stored(tmp_path / "r", records))
    assert timing(summary, "step_time_s")["n"] == 4
    assert timing(summary, "step_time_s")["max"] == pytest.approx(0.030)
    assert timing(summary, "step_time_s")["mean"] == pytest.approx(0.020)
    assert timing(summary, "ttft_s")["max"] == pytest.approx(5.0)
    assert timing(summary, "ttft_s")["min"] == pytest.approx(4.999)
    assert timing(summary, "e2e_s")["max"] == pytest.approx(5.040)


def test_user_tps_counts_tokens_after_the_first_step_however_many_that_held(tmp_path: Path) -> None:
    """Trap 6: a first chunk of 3 tokens; then 8 tokens in 40 ms."""
    record = turn("r", [3, 4, 4], times_ns=[S, S + 20 * MS, S + 40 * MS])
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", record)]))
    assert timing(summary, "user_tps")["mean"] == pytest.approx(8 / 0.040)
    assert timing(summary, "user_tps")["std"] is None


def test_no_rate_of_a_single_step(tmp_path: Path) -> None:
    summary = summarize(stored(tmp_path / "r", [conversation("c", "a", [1])]))
    assert summary.timing["user_tps"] is None
    assert summary.timing["step_time_s"] is None
    assert timing(summary, "output_tokens")["max"] == 1


def test_distribution_by_hand() -> None:
    found = metrics.describe(np.array([4.0, 1.0, 3.0, 2.0]))
    assert found is not None
    assert (found["n"], found["min"], found["mean"], found["max"]) == (4, 1, 2.5, 4)
    assert found["std"] == pytest.approx((5 / 3) ** 0.5)
    assert (found["p25"], found["p50"], found["p75"]) == (1.75, 2.5, 3.25)
    assert found["p99"] == pytest.approx(3.97)
    assert metrics.describe(np.zeros(0)) is None


def scheduled(directory: Path, **about: object) -> Run:
    """Two slots, four conversations: each 100 ms a step, of 1 token and then of 2 each.

    c0 runs 0-300, c1 200-600, c2 300-700, c3 600-900 (ms). All slots are filled at 200, when c1
    is submitted, and the queue is empty at 600, when c3 is.
    """
    spans = {"c0": (0, 3), "c1": (2, 4), "c2": (3, 4), "c3": (6, 3)}
    records = [
        conversation(
            name,
            "a",
            turn(
                name,
                [1] + [2] * (n - 1),
                submitted_ns=begin * 100 * MS,
                times_ns=[(begin + 1 + i) * 100 * MS for i in range(n)],
            ),
        )
        for name, (begin, n) in spans.items()
    ]
    about = {"sessions": [session(ended_ns=S)], **about}
    return stored(directory, records, **about)


def test_steady_window_of_a_hand_made_schedule(tmp_path: Path) -> None:
    """In (200, 600]: c0 makes 2, c1 1+2+2+2, c2 1+2+2: 14 tokens in 0.4 s."""
    summary = summarize(scheduled(tmp_path / "r"))
    assert summary.steady_duration_s == pytest.approx(0.4)
    assert summary.output_tps_steady.value == pytest.approx(14 / 0.4)
    assert summary.output_tps.value == pytest.approx(24 / 1.0)
    assert summary.output_tps_per_gpu.value == pytest.approx(24 / 1.0)


def test_throughput_counts_tokens_never_chunks(tmp_path: Path) -> None:
    """Trap 18: 24 tokens in 14 steps."""
    summary = summarize(scheduled(tmp_path / "r"))
    assert summary.n_steps == 14
    assert summary.n_output_tokens == 24
    user = timing(summary, "user_tps")
    assert user["min"] == user["max"] == pytest.approx(20.0)


def test_per_gpu_divides_by_all_gpus_used(tmp_path: Path) -> None:
    config = {"tp_size": 2, "pp_size": 3, "dp_size": 2, "ep_size": 4}
    summary = summarize(scheduled(tmp_path / "r", config=config))
    assert summary.output_tps_per_gpu.value == pytest.approx(24 / 12)


def test_no_number_per_gpu_without_a_gpu(tmp_path: Path) -> None:
    run = scheduled(tmp_path / "r")
    manifest = store.read_manifest(run.directory)
    manifest["environment"]["gpus"] = []
    store.write_manifest(run.directory, manifest)
    figure = summarize(store.load(run.directory)).output_tps_per_gpu
    assert figure.value is None
    assert "no GPU" in figure.why_not


def test_no_steady_window_with_fewer_conversations_than_slots(tmp_path: Path) -> None:
    summary = summarize(scheduled(tmp_path / "r", config={"concurrency": 4}))
    assert summary.output_tps_steady.value is None
    assert summary.output_tps_steady.why_not
    assert summary.output_tps.value == pytest.approx(24.0)


def test_no_steady_window_in_an_open_loop(tmp_path: Path) -> None:
    """Its slots are as full as conversations come: that says nothing of the engine."""
    config = {"request_rate": 5.0, "arrivals": "constant"}
    summary = summarize(scheduled(tmp_path / "r", config=config))
    assert summary.output_tps_steady.value is None
    assert "arrivals set it" in summary.output_tps_steady.why_not
    assert summary.steady_duration_s is None
    assert summary.output_tps.value == pytest.approx(24.0)
    assert summary.curves.timeline is not None
    assert summary.curves.timeline.steady_s is None


@pytest.mark.parametrize(
    ("sessions", "why"),
    [
        ([session(0), session(1)], "2 sessions"),
        ([session(0, ended_ns=None)], "did not end in order"),
        ([session(0, n_uncommitted=2, n_uncommitted_tokens=50)], "in flight"),
    ],
)
def test_throughput_is_not_given_where_the_records_cannot_support_it(
    tmp_path: Path, sessions: list[dict[str, object]], why: str
) -> None:
    summary = summarize(scheduled(tmp_path / "r", sessions=sessions))
    for figure in (summary.output_tps, summary.output_tps_steady, summary.output_tps_per_gpu):
        assert figure.value is None
        assert why in figure.why_not


def test_user_tps_of_a_conversation_sums_over_its_turns(tmp_path: Path) -> None:
    """Turn 0: 8 tokens in 20 ms after the first step; turn 1: 4 in 100 ms; turn 2 has one step."""
    records = [
        conversation(
            "c",
            "a",
            turn("c.0", [1, 4, 4], times_ns=[S, S + 10 * MS, S + 20 * MS]),
            turn("c.1", [1, 4], number=1, times_ns=[2 * S, 2 * S + 100 * MS]),
            turn("c.2", [1], number=2, times_ns=[3 * S]),
        ),
        conversation("one", "a", [1]),
        conversation("bad", "a", turn("bad", [1, 2], finish="error", error="x")),
    ]
    run = stored(tmp_path / "r", records)
    found = dict(
        zip(run.columns.conversation_ids, metrics.conversation_user_tps(run.columns), strict=True)
    )
    assert found["c"] == pytest.approx(12 / 0.120)
    assert np.isnan(found["one"])
    assert np.isnan(found["bad"])


# --- replicas -------------------------------------------------------------------------------------


def two_replicas(directory: Path, *, clocks: tuple[str, str], met_ns: tuple[int, int]) -> Run:
    """By hand, 2 slots in each. Replica 0, in ms: conversations begin at 0, 0, 100, 300 and make a
    token 50 ms after that and every 100 ms, three each. Replica 1: the same, 20 ms later by a clock
    that is `met_ns` ahead."""
    store.create(directory)
    entries = [
        session(replica=r, clock=clocks[r], met_ns=met_ns[r], started_ns=met_ns[r],
                ended_ns=met_ns[r] + (600 + 20 * r) * MS)
        for r in (0, 1)
    ]  # fmt: skip
    store.write_manifest(directory, manifest(expected={"c": 8}, sessions=entries, draft_length=0))
    for r in (0, 1):
        ahead = met_ns[r] + 20 * r * MS
        records = [
            conversation(f"{r}-{i}", "c", turn(f"r{r}-{i}.0", [1, 1, 1],
                         submitted_ns=ahead + begin * MS, ttft_ns=50 * MS, step_ns=100 * MS))
            for i, begin in enumerate((0, 0, 100, 300))
        ]  # fmt: skip
        write_part(directory, records, 0, r)
    return store.load(directory)


@pytest.mark.parametrize(
    ("clocks", "met_ns"),
    [(("boot 1", "boot 1"), (0, 0)), (("boot 1", "boot 2"), (7 * S, 1234567 * MS))],
)
def test_replicas_are_counted_in_a_window_they_share(
    tmp_path: Path, clocks: tuple[str, str], met_ns: tuple[int, int]
) -> None:
    """Replica 0 is steady from 0 to 300 ms, replica 1 from 20 to 320: together from 20 to 300.

    Tokens of replica 0 in there: at 50, 150, 250 of two; at 150, 250 of the third: 8. Replica 1's
    are 20 ms later, at 70, 170, 270 and 170, 270: 8. In all 24 tokens, from 0 to 620 ms.
    """
    summary = summarize(two_replicas(tmp_path / "r", clocks=clocks, met_ns=met_ns))
    assert summary.steady_duration_s == pytest.approx(0.28, rel=1e-12)
    assert summary.output_tps_steady.value == pytest.approx(16 / 0.28, rel=1e-12)
    assert summary.output_tps.value == pytest.approx(24 / 0.62, rel=1e-12)
    assert summary.output_tps_per_gpu.value == pytest.approx(24 / 0.62 / 2, rel=1e-12)


def test_one_clock_needs_no_meeting(tmp_path: Path) -> None:
    """On one host the clock is exact; the meeting, which is not, moves nothing."""
    run = two_replicas(tmp_path / "r", clocks=("boot 1", "boot 1"), met_ns=(0, 0))
    for entry, late in zip(run.manifest["sessions"], (0, 13 * MS), strict=True):
        entry["met_ns"] += late
    assert summarize(run).output_tps_steady.value == pytest.approx(16 / 0.28, rel=1e-12)


def test_replicas_that_are_never_steady_together(tmp_path: Path) -> None:
    run = two_replicas(tmp_path / "r", clocks=("a", "b"), met_ns=(10 * S, 0))
    for entry in run.manifest["sessions"]:
        entry["met_ns"] = 10 * S  # so replica 1 measured ten seconds earlier
    summary = summarize(run)
    assert summary.output_tps_steady.value is None
    assert "same time" in summary.output_tps_steady.why_not


def test_merged_jobs_are_only_compared_on_one_clock(tmp_path: Path) -> None:
    for name, clocks, steady in (
        ("a", ("boot 1",) * 2, 16 / 0.28),
        ("b", ("boot 1", "boot 2"), None),
    ):
        run = two_replicas(tmp_path / name, clocks=clocks, met_ns=(0, 0))
        union = replace(run, manifest={**run.manifest, "merged": ["x", "y"]})
        summary = summarize(union)
        assert summary.output_tps.value is None
        assert summary.output_tps.why_not
        assert summary.output_tps_per_gpu.value is None
        assert summary.output_tps_steady.value == (steady and pytest.approx(steady, rel=1e-12))
