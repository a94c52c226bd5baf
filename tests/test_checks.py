"""Sentences of doubt: silent where all is well, and each spoken for its own fault only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speedbench import store
from speedbench.checks import all_checks, reconcile
from speedbench.store import Run
from speedbench.types import ConversationRecord, RoutedExperts
from tests.builders import MS, conversation, counters, session, stored, told, turn, write_part

GOOD = [1, 4, 2, 1, 4]


def good(n: int = 3) -> list[ConversationRecord]:
    """Per conversation 4 drafts and 7 accepted tokens; the last step is uncut."""
    return [conversation(f"c{i}", "a", turn(f"c{i}", GOOD, told=told(GOOD, 3))) for i in range(n)]


def with_counters(drafts: int, accepted: int, **about: Any) -> list[dict[str, Any]]:
    return [session(counters=counters(drafts, accepted), **about)]


def said(run: Run, level: str | None = None) -> list[str]:
    return [c.sentence for c in all_checks(run) if level is None or c.level == level]


def only(run: Run, level: str, *words: str) -> None:
    """Exactly one sentence, of this level, with these words."""
    (check,) = all_checks(run)
    assert check.level == level
    for word in words:
        assert word in check.sentence


def test_silence_where_all_is_well(tmp_path: Path) -> None:
    assert said(stored(tmp_path / "r", good(), sessions=with_counters(12, 21))) == []


def test_silence_for_a_baseline(tmp_path: Path) -> None:
    records = [conversation("c", "a", turn("c", [1, 1, 1], told=[(0, 0)] * 3))]
    assert said(stored(tmp_path / "r", records, draft_length=0)) == []


# --- provenance and completeness ------------------------------------------------------------------


def run_with(directory: Path, **about: Any) -> Run:
    return stored(directory, good(), sessions=about.pop("sessions", with_counters(12, 21)), **about)


def test_a_simulation_says_so_first(tmp_path: Path) -> None:
    run = run_with(tmp_path / "r", engine={"simulated": True})
    only(run, "error", "SIMULATED")


def test_another_width_than_asked_for(tmp_path: Path) -> None:
    """Trap 12: K=8 asked for, the engine drafts 3."""
    only(run_with(tmp_path / "r", config={"draft_length": 8}), "warning", "drafts 3", "8 were")


def test_a_draft_length_that_was_left_to_the_server(tmp_path: Path) -> None:
    """The default, 3, was not asked for; 8 was."""
    told_by = {"settings": {"draft_length_from": "as the server says"}, "draft_length": 5}
    counted = [session(counters=counters(12, 21, 5))]
    left_out = run_with(
        tmp_path / "out", engine=told_by, config={"draft_length": 3}, sessions=counted
    )
    assert not any("asked for" in sentence for sentence in said(left_out))
    named = run_with(tmp_path / "in", engine=told_by, config={"draft_length": 8}, sessions=counted)
    assert any("drafts 5 tokens per step, 8 were asked for" in s for s in said(named, "warning"))


def test_fewer_slots_than_concurrency(tmp_path: Path) -> None:
    run = run_with(tmp_path / "r", engine={"max_num_seqs": 1})
    only(run, "warning", "at most 1 requests", "TTFT")
    limit = {"request_rate": 5.0, "concurrency": 512}  # of an open loop: nobody need have waited
    assert said(run_with(tmp_path / "open", engine={"max_num_seqs": 64}, config=limit)) == []


def served_by(endpoint: str) -> dict[str, Any]:
    return {"engine": "OPENAI", "url": "http://h:1", "model": "m", "endpoint": endpoint}


def test_of_a_chat_identical_inputs_cannot_be_shown(tmp_path: Path) -> None:
    only(run_with(tmp_path / "chat", config=served_by("chat")), "note", "cannot be shown")
    assert said(run_with(tmp_path / "ids", config=served_by("completions"))) == []


def test_a_prefix_cache_nobody_asked_for(tmp_path: Path) -> None:
    """Trap 7."""
    only(run_with(tmp_path / "r", engine={"prefix_cache": True}), "warning", "prefix cache")
    asked = run_with(
        tmp_path / "asked", engine={"prefix_cache": True}, config={"prefix_cache": True}
    )
    assert said(asked) == []


def test_failed_refused_and_unasked_rows(tmp_path: Path) -> None:
    bad = conversation("bad", "a", turn("bad", [1, 4], finish="error", error="out of memory"))
    run = stored(
        tmp_path / "r",
        [*good(), bad],
        expected={"a": 7},
        status="partial",
        sessions=[session(message="SIGTERM was received", end="stopped")],
        refused=[{"id": "long", "category": "a", "reason": "too long", "n_prompt_tokens": 9}],
    )
    warnings = said(run, "warning")
    assert any("SIGTERM was received" in s for s in warnings)
    assert any("1 conversation(s) failed" in s and "out of memory" in s for s in warnings)
    assert any("1 row(s) were refused" in s and "'long'" in s for s in warnings)
    assert any("2 conversation(s) have not been measured" in s for s in warnings)
    assert len(warnings) == 4


def test_a_killed_run_says_so(tmp_path: Path) -> None:
    assert "killed" in said(run_with(tmp_path / "r", status="running"), "warning")[0]


def test_stray_steps_and_resumptions_are_told(tmp_path: Path) -> None:
    stray = run_with(tmp_path / "r", sessions=[session(n_stray_steps=4)])
    assert any("4 step(s) came for requests" in s for s in said(stray, "warning"))
    twice = [*with_counters(12, 21), session(1, counters=counters(0, 0))]
    only(run_with(tmp_path / "twice", sessions=twice), "note", "2 sessions")


def test_a_damaged_part_is_an_error_and_ends_the_reconciliation(tmp_path: Path) -> None:
    run = run_with(tmp_path / "r", sessions=with_counters(16, 28))
    write_part(run.directory, [conversation("d", "a", turn("d", GOOD, told=told(GOOD, 3)))])
    path = run.directory / "steps" / "00001.parquet"
    path.write_bytes(path.read_bytes()[:50])
    run = store.load(run.directory)
    (sentence,) = said(run, "error")
    assert "part 00001" in sentence
    assert any("cannot be reconciled" in s for s in said(run, "note"))


# --- steps ----------------------------------------------------------------------------------------


def run_of(directory: Path, *records: ConversationRecord, **about: Any) -> Run:
    about.setdefault("draft_length", 3)
    return stored(directory, records, **about)


def errors(directory: Path, lengths: Sequence[int], **about: Any) -> list[str]:
    return said(run_of(directory, conversation("c", "a", turn("c", lengths, **about))), "error")


def test_steps_longer_than_a_step_can_be(tmp_path: Path) -> None:
    """Trap 4."""
    found = errors(tmp_path / "r", [1, 6, 4])
    assert found[0].startswith("1 step(s) hold more than K+1 = 4 tokens")


def test_merged_events_are_told_with_their_share(tmp_path: Path) -> None:
    record = conversation("c", "a", turn("c", [1, 4, 7, 2], engine_steps=[1, 1, 2, 0]))
    run = run_of(tmp_path / "r", record)
    assert any("2 of 4 events (50.0%)" in s for s in said(run, "warning"))
    assert said(run, "error") == []


def test_a_prefill_that_shows_several_tokens(tmp_path: Path) -> None:
    (sentence,) = errors(tmp_path / "r", [3, 4, 4])
    assert "begin with several tokens" in sentence


def test_a_step_without_a_token(tmp_path: Path) -> None:
    assert errors(tmp_path / "r", [1, 0, 4]) == ["1 step(s) hold no token"]


def test_shown_tokens_beside_what_the_engine_says(tmp_path: Path) -> None:
    """Only a final step may show less than was accepted, and none may show more."""
    (sentence,) = errors(tmp_path / "a", [1, 2, 4], told=[(0, 0), (3, 3), (3, 3)])
    assert "another number of tokens" in sentence
    assert errors(tmp_path / "b", [1, 4, 2], told=[(0, 0), (3, 3), (3, 3)]) == []
    (sentence,) = errors(tmp_path / "c", [1, 4, 3], told=[(0, 0), (3, 3), (1, 3)])
    assert "another number of tokens" in sentence


def test_a_step_without_a_draft_makes_one_token(tmp_path: Path) -> None:
    (sentence,) = errors(tmp_path / "r", [1, 2, 4], told=[(0, 0), (-1, 0), (3, 3)])
    assert "more tokens than were drafted" in sentence


def test_requests_longer_than_asked_for(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", good(), config={"output_length": 11})
    assert said(run, "error") == ["3 request(s) are longer than 11 tokens"]


def test_tokens_that_are_not_the_sum_of_steps(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = run_with(tmp_path / "r")
    path = run.directory / "turns" / "00000.parquet"
    table = pq.read_table(path)
    ids = [*table["output_token_ids"].to_pylist()[:-1], [1, 2]]
    place = table.schema.get_field_index("output_token_ids")
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(ids, field.type)), path)
    only(store.load(run.directory), "error", "1 request(s) have another number of tokens")


@pytest.mark.parametrize(
    ("times_ns", "words"),
    [
        ([50 * MS, 40 * MS, 60 * MS], "clock runs backwards"),
        ([-1, 40 * MS, 60 * MS], "clock runs backwards"),
        ([50 * MS] * 3, "2 step(s) came at the same instant"),
        ([50 * MS, 60 * MS, 2**62], "1 step(s) are stamped outside of their session"),
    ],
)
def test_clocks_that_cannot_be(tmp_path: Path, times_ns: list[int], words: str) -> None:
    (sentence,) = errors(tmp_path / "r", [1, 4, 4], times_ns=times_ns)
    assert words in sentence


# --- the engine's counters ------------------------------------------------------------------------


def books(
    directory: Path,
    lengths: Sequence[int],
    drafts: int,
    accepted: int,
    **about: Any,
) -> Run:
    record = conversation("c", "a", turn("c", lengths, **about))
    return run_of(directory, record, sessions=with_counters(drafts, accepted))


def test_cut_tokens_are_reconciled_by_name(tmp_path: Path) -> None:
    """vLLM's [1, 4, 2] at K=3: 2 drafts, 6 accepted, of which the end cut 2."""
    run = books(tmp_path / "r", [1, 4, 2], 2, 6, told=told([1, 4, 2], 3, last=3))
    assert said(run) == []
    assert reconcile(run) == {
        "counter_accepted": 6,
        "counter_drafts": 2,
        "accepted": 4,
        "cut": 2,
        "decode": 2,
        "plain": 0,
        "phantom": 0,
        "untold": 0,
        "merged": 0,
        "exact": True,
        "unexplained_accepted": 0,
        "unexplained_drafts": 0,
    }


def test_plain_steps_are_no_drafts(tmp_path: Path) -> None:
    """Two n-gram misses and a hit: one draft."""
    run = books(tmp_path / "r", [1, 1, 1, 4], 1, 3, told=[(0, 0), (0, 0), (0, 0), (3, 3)])
    assert said(run) == []
    assert reconcile(run)["plain"] == 2


def test_phantom_drafts_of_a_padded_prefill(tmp_path: Path) -> None:
    run = books(tmp_path / "r", [1, 4], 2, 3, told=[(0, 3), (3, 3)])
    assert said(run) == []
    assert reconcile(run)["phantom"] == 1


def test_what_is_left_over_is_an_error_with_its_size(tmp_path: Path) -> None:
    run = books(tmp_path / "r", GOOD, 5, 10, told=told(GOOD, 3))
    accepted, drafts = said(run, "error")
    assert "counted 10 accepted" in accepted
    assert "+3 unexplained" in accepted
    assert "counted 5 drafts" in drafts
    assert "+1 unexplained" in drafts
    run = books(tmp_path / "less", GOOD, 3, 5, told=told(GOOD, 3))
    accepted, drafts = said(run, "error")
    assert "-2 unexplained" in accepted
    assert "-1 unexplained" in drafts


@pytest.mark.parametrize(
    ("drafts", "accepted", "n_errors"),
    [(2, 4, 0), (2, 6, 0), (3, 4, 0), (0, 4, 0), (2, 7, 1), (2, 3, 1), (4, 4, 1)],
)
def test_untold_steps_leave_bounds(
    tmp_path: Path, drafts: int, accepted: int, n_errors: int
) -> None:
    """[1, 4, 2] untold: 0 to 2 drafts and perhaps a phantom; 4 accepted and 0 to 2 cut."""
    run = books(tmp_path / "r", [1, 4, 2], drafts, accepted)
    assert len(said(run, "error")) == n_errors
    (note,) = said(run, "note")
    assert "within bounds" in note
    assert "2 step(s)" in note


@pytest.mark.parametrize(("drafts", "accepted", "n_errors"), [(3, 8, 0), (2, 3, 0), (3, 11, 1)])
def test_merged_events_leave_bounds_not_errors(
    tmp_path: Path, drafts: int, accepted: int, n_errors: int
) -> None:
    """4 tokens drafted, and an event of 7 that stands for unknown steps: up to 6 accepted."""
    run = books(
        tmp_path / "r",
        [1, 7, 4],
        drafts,
        accepted,
        engine_steps=[1, 2, 1],
        told=[(0, 0), (-1, -1), (3, 3)],
    )
    assert len(said(run, "error")) == n_errors


def test_drafts_of_what_is_recorded_as_a_baseline(tmp_path: Path) -> None:
    """A server behind a gateway, of which nobody said that it speculates."""
    records = [conversation("c", "a", turn("c", [1, 1, 1], told=[(0, 0)] * 3))]
    config = served_by("completions")
    for name, sessions in (
        ("whole", with_counters(2, 0)),
        ("resumed", [session(), session(1, counters=counters(2, 0))]),
    ):
        run = stored(tmp_path / name, records, draft_length=0, config=config, sessions=sessions)
        (sentence,) = said(run, "error")
        assert sentence.startswith("2 drafts were counted, but the run is recorded as one without")
    none = stored(tmp_path / "none", records, draft_length=0, sessions=with_counters(0, 0))
    assert said(none) == []


@pytest.mark.parametrize(
    ("k", "algorithm", "n_errors", "n_warnings"),
    [
        (5, "EAGLE3", 1, 0),  # 60 tokens in 12 drafts, of 3 each at most
        (4, "NGRAM", 1, 0),
        (3, "EAGLE3", 0, 0),
        (2, "EAGLE3", 0, 1),  # 24 in 12
        (2, "NGRAM", 0, 0),  # a lookup may find fewer
    ],
)
def test_the_draft_length_is_held_against_the_counters(
    tmp_path: Path, k: int, algorithm: str, n_errors: int, n_warnings: int
) -> None:
    run = run_with(
        tmp_path / "r",
        sessions=[session(counters=counters(12, 21, k))],
        config={
            **served_by("completions"), "speculative_algorithm": algorithm, "draft_model_dir": None,
        },
        engine={"settings": {"draft_length_from": "as the user says"}},
    )  # fmt: skip
    counted = f"{12 * k} draft tokens in 12 drafts were counted"
    for level, n in (("error", n_errors), ("warning", n_warnings)):
        found = said(run, level)
        assert len(found) == n
        assert all(counted in sentence and "K = 3 each" in sentence for sentence in found)


def test_counters_of_requests_that_are_not_recorded(tmp_path: Path) -> None:
    sessions = with_counters(99, 99, n_uncommitted=1)
    run = stored(tmp_path / "r", good(), sessions=sessions)
    only(run, "note", "cannot be reconciled")
    nothing = stored(tmp_path / "none", good(), sessions=[session()])
    only(nothing, "note", "counters are not stored")


# --- rates ----------------------------------------------------------------------------------------


def rates(directory: Path, histogram: dict[int, int], **about: Any) -> Run:
    """One request with so many steps of each length, K=4, ending in a whole step."""
    lengths = [1, *(n for n, count in sorted(histogram.items()) for _ in range(count))]
    assert lengths[-1] == 5
    record = conversation("c", "a", turn("c", lengths, told=about.pop("told", told(lengths, 4))))
    about.setdefault("config", {})["draft_length"] = 4
    return stored(directory, [record], draft_length=4, **about)


def position_1(run: Run) -> list[str]:
    return [s for s in said(run, "warning") if "position 1" in s]


def test_a_first_position_far_below_the_later_ones(tmp_path: Path) -> None:
    """Trap 8: 12 % at position 1, then 80 % and more."""
    (sentence,) = position_1(rates(tmp_path / "r", {1: 880, 2: 20, 3: 10, 4: 10, 5: 80}))
    assert "accepted at 0.120" in sentence


def test_one_rare_late_position_does_not_silence_it(tmp_path: Path) -> None:
    """Position 4 was tried once and failed: its rate of 0 is no excuse."""
    lengths = [1] + [1] * 880 + [2] * 5 + [3] * 114 + [4]
    record = conversation("c", "a", turn("c", lengths, told=told(lengths, 4)))
    run = stored(
        tmp_path / "r", [record], draft_length=4, config={"draft_length": 4, "output_length": 9999}
    )
    assert position_1(run)


@pytest.mark.parametrize(
    "histogram",
    [
        {1: 300, 2: 210, 3: 150, 4: 100, 5: 240},  # a healthy drafter: 0.7 everywhere
        {1: 500, 2: 100, 3: 80, 4: 60, 5: 260},  # 0.5, then 0.8: hard, not broken
        {1: 60, 5: 8},  # too few steps to say
    ],
)
def test_a_first_position_that_is_no_cause_for_alarm(
    tmp_path: Path, histogram: dict[int, int]
) -> None:
    assert position_1(rates(tmp_path / "r", histogram)) == []


def test_lookup_misses_that_look_like_rejections_are_no_cause_for_alarm(tmp_path: Path) -> None:
    """NGRAM on an engine that tells nothing: 88 % of its steps are misses, not rejections."""
    config = {"speculative_algorithm": "NGRAM", "draft_model_dir": None}
    run = rates(tmp_path / "r", {1: 880, 4: 20, 5: 100}, told=None, config=config)
    assert position_1(run) == []
    drafter = rates(tmp_path / "d", {1: 880, 4: 20, 5: 100}, told=None)
    assert position_1(drafter)


def test_speculation_that_never_drafted(tmp_path: Path) -> None:
    """Trap 7: silently a baseline."""
    plain = [conversation("c", "a", turn("c", [1] * 9, told=[(0, 0)] * 9))]
    found = said(stored(tmp_path / "r", plain), "error")
    assert found == ["speculation was asked for, but not one draft was checked"]
    config = {"speculative_algorithm": "NGRAM", "draft_model_dir": None}
    lookup = stored(tmp_path / "n", plain, config=config)
    assert said(lookup, "error") == []
    assert any("never hit" in s for s in said(lookup, "warning"))


def test_the_verdict_of_a_known_answer(tmp_path: Path) -> None:
    right = run_with(tmp_path / "a", known_answer={"ok": True, "sentence": "exact."})
    only(right, "note", "known-answer", "exact.")
    wrong = run_with(tmp_path / "b", known_answer={"ok": False, "sentence": "3 differ."})
    only(wrong, "error", "known-answer", "3 differ.")


# --- routed experts -------------------------------------------------------------------------------


def with_experts(n_tokens: int | None) -> ConversationRecord:
    """A conversation of 5 prompt and 12 output tokens, with the experts of so many of them."""
    record = turn("c0", GOOD, told=told(GOOD, 3))
    if n_tokens is not None:
        captured = RoutedExperts(n_tokens, 1, 1, bytes(2 * n_tokens))
        record = replace(
            record, steps=[*record.steps[:-1], record.steps[-1]._replace(routed_experts=captured)]
        )
    return conversation("c0", "a", record)


@pytest.mark.parametrize(
    ("n_tokens", "words"), [(None, "1 request(s) came without"), (17, "1 with")]
)
def test_experts_that_were_asked_for_and_did_not_come(
    tmp_path: Path, n_tokens: int | None, words: str
) -> None:
    about = {"config": {"capture_experts": True}, "sessions": with_counters(4, 7)}
    run = stored(tmp_path / "r", [with_experts(n_tokens)], **about)
    only(run, "error", "--capture_experts was asked for", words)
    good_run = stored(tmp_path / "good", [with_experts(16)], **about)
    assert said(good_run) == []


def test_a_drafter_that_is_never_right_is_doubted(tmp_path: Path) -> None:
    never = [1] * 30
    rows = [conversation(f"c{i}", "a", turn(f"c{i}", never, told=told(never, 3))) for i in range(3)]
    run = stored(tmp_path / "r", rows, sessions=with_counters(87, 0))
    assert any("not one draft token was accepted in 87 steps" in s for s in said(run, "warning"))
    few = [conversation("c0", "a", turn("c0", [1, 1, 1], told=told([1, 1, 1], 3)))]
    assert said(stored(tmp_path / "few", few, sessions=with_counters(2, 0)), "warning") == []
