"""Insights of stored runs: vocabulary coverage, random prompts, AL along the answer, savings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from speedbench import draft_vocabulary, metrics, stats, store
from speedbench.calibration.closed_form import Case, KnownAnswer, expected_al, read_known_answer
from speedbench.checks import counted
from speedbench.insights import position, random_tokens, saving, vocabulary
from speedbench.insights.collected import collect
from speedbench.insights.options import InsightOptions, think_end_ids
from speedbench.insights.steps import Measured, Tokens, measured, steps_of, tokens_of
from speedbench.report.arms import Arm, grouped
from speedbench.report.blocks import Block, Chart, Heading, Paragraph, Table
from speedbench.report.compare import compare
from speedbench.report.layout_insights import of_arms
from speedbench.report.merge import merged
from speedbench.report.summary import summarize
from speedbench.report.text import Text
from speedbench.store import Run
from speedbench.types import ConversationRecord, FinishReason, Step, TurnRecord, UserError
from tests.builders import MS, S, conversation, session, stored, told, turn

NO_OPTIONS = InsightOptions()


def said(
    name: str,
    steps: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]] | None = None,
    number: int = 0,
    finish: FinishReason = "stop",
) -> TurnRecord:
    """A turn that said these tokens, step by step; pairs: (accepted, drafted) of each."""
    last = len(steps) - 1
    made = [
        Step(
            name,
            (i + 1) * MS,
            list(tokens),
            finish_reason=finish if i == last else None,
            detail=list(pairs) if pairs is not None and i == last else None,
        )
        for i, tokens in enumerate(steps)
    ]
    return TurnRecord(name, number, 5, "00", 0, finish, None, made)


def one_arm(*runs: Run, label: str = "arm") -> Arm:
    return Arm(label, runs)


def seen(*runs: Run) -> Measured:
    (found,) = measured([one_arm(*runs)])
    return found


# --- steps ----------------------------------------------------------------------------------------

LENGTHS = st.lists(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), min_size=1, max_size=3),
    min_size=1,
    max_size=6,
)
"""Conversations of turns of events with 1 to K+1 = 4 tokens; the first one is the prefill."""


def made(tmp: Path, lengths: Sequence[Sequence[Sequence[int]]], tell: bool = False) -> Run:
    def of_turn(name: str, number: int, events: Sequence[int]) -> TurnRecord:
        events = [1, *events[1:]]
        pairs = told(events, 3) if tell else None
        return turn(name, events, number=number, told=pairs)

    records = [
        ConversationRecord(
            f"c{i}", "xy"[i % 2], tuple(of_turn(f"c{i}.{t}", t, e) for t, e in enumerate(turns))
        )
        for i, turns in enumerate(lengths)
    ]
    return stored(tmp / "r", records)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_parts_of_answers_add_up_to_the_run(
    tmp_path_factory: pytest.TempPathFactory, lengths: Any, width: int, tell: bool
) -> None:
    """Bins of output position, turns, and thinking with answer: each step is in exactly one."""
    run = made(tmp_path_factory.mktemp("run"), lengths, tell)
    steps, whole = steps_of(one_arm(run)), counted(run)
    for group in (steps.position // width, steps.turn):
        sums = steps.counts(group, int(group.max(initial=0)) + 1)
        assert (sums[0].sum(axis=1) == whole.whole).all()
        assert (sums[1].sum(axis=1) == whole.cut).all()
    n_decode = whole.n_decode
    for found in (
        position.by_position(seen(run), width),
        position.by_turn(seen(run)),
        position.by_thinking(seen(run), [7]),
    ):
        assert sum(one.n_steps for one in found.slices) == n_decode


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_positions_are_those_of_a_loop(
    tmp_path_factory: pytest.TempPathFactory, lengths: Any, width: int
) -> None:
    """A twin that walks through every answer; AL without cut steps is then a plain mean."""
    run = made(tmp_path_factory.mktemp("run"), lengths, tell=True)
    by_bin: dict[int, list[int]] = {}
    for turns in lengths:
        for events in turns:
            place = 1
            for n in events[1:]:
                by_bin.setdefault(place // width, []).append(n)
                place += n
    found = position.by_position(seen(run), width).slices
    for number, one in enumerate(found):
        values = by_bin.get(number, [])
        assert one.n_steps == len(values)
        if values:
            assert one.al.value == pytest.approx(sum(values) / len(values))
        else:
            assert one.al.value is None
            assert one.al.why_not == "no step"


def test_repeats_of_a_conversation_are_one_unit(tmp_path: Path) -> None:
    records = [conversation(f"c{i}", "x", [1, 1 + i % 4, 2]) for i in range(8)]
    run = stored(tmp_path / "a", records)
    again = stored(tmp_path / "b", records)
    one, two = steps_of(one_arm(run)), steps_of(one_arm(run, again))
    assert len(two.conversations.ids) == len(one.conversations.ids) == 8
    assert len(two.length) == 2 * len(one.length)
    first, second = (position.by_position(of, 2) for of in (seen(run), seen(run, again)))
    assert [s.al for s in first.slices] == [s.al for s in second.slices]


def test_failed_conversations_are_left_out(tmp_path: Path) -> None:
    bad = turn("b.0", [1, 4, 4], finish="error", error="broke")
    run = stored(
        tmp_path / "r",
        [conversation("a", "x", [1, 2, 2]), ConversationRecord("b", "x", (bad,))],
    )
    steps = steps_of(one_arm(run))
    assert steps.conversations.ids == ("a",)
    assert steps.length.tolist() == [2, 2]


# --- AL along the answer --------------------------------------------------------------------------


def test_a_cut_step_is_censored_in_its_bin(tmp_path: Path) -> None:
    """K = 3. Bin 0: 4, 4 and a last step that shows 2: positions 1 of 3, 2 of 2, 3 of 2 go on."""
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 4, 4, 2])])
    (only,) = position.by_position(seen(run), 100).slices
    assert only.al.value == pytest.approx(1 + 1 + 1 + 1)
    assert only.n_steps == 3
    run = stored(tmp_path / "s", [conversation("a", "x", [1, 4, 1, 2])])
    (only,) = position.by_position(seen(run), 100).slices
    # reached position 1: three steps, one ended there; position 2 and 3: the first one only.
    assert only.al.value == pytest.approx(1 + 2 / 3 * (1 + 1 + 1))


def test_later_bins_are_held_against_the_same_conversations(tmp_path: Path) -> None:
    """Short answers are accepted well, long ones badly all along: nothing falls within one."""
    short = [conversation(f"s{i}", "x", told_turn(f"s{i}.0", [1, 4, 4])) for i in range(6)]
    long = [conversation(f"l{i}", "x", told_turn(f"l{i}.0", [1] + [2] * 10)) for i in range(6)]
    run = stored(tmp_path / "r", [*short, *long])
    first, second, third = position.by_position(seen(run), 9).slices
    assert first.n_conversations == 12
    assert second.n_conversations == third.n_conversations == 6
    assert first.al.value == pytest.approx((6 * 8 + 6 * 8) / (6 * 2 + 6 * 4))
    assert second.al.value == second.al_first.value == 2.0
    assert second.difference.value == 0.0
    assert second.difference.interval == (0.0, 0.0)
    assert first.difference.value is None
    assert "itself" in first.difference.why_not


def told_turn(name: str, lengths: Sequence[int], number: int = 0) -> TurnRecord:
    return turn(name, lengths, number=number, told=told(lengths, 3))


def test_the_difference_between_turns_is_paired(tmp_path: Path) -> None:
    """Conversations differ widely; each is 1 token longer per step in its second turn."""
    records = [
        ConversationRecord(
            f"c{i}",
            "x",
            (
                told_turn(f"c{i}.0", [1, 1 + i % 3, 1 + i % 3]),
                told_turn(f"c{i}.1", [1, 2 + i % 3, 2 + i % 3], 1),
            ),
        )
        for i in range(9)
    ]
    records.append(ConversationRecord("one", "x", (told_turn("one.0", [1, 4, 4]),)))
    run = stored(tmp_path / "r", records)
    first, second = position.by_turn(seen(run)).slices
    assert (first.label, second.label) == ("turn 1", "turn 2")
    assert (first.n_conversations, second.n_conversations) == (10, 9)
    assert second.al.value == 3.0
    assert second.al_first.value == 2.0
    assert second.difference.value == pytest.approx(1.0)
    assert second.difference.interval == pytest.approx((1.0, 1.0))
    assert second.al.interval is not None
    assert second.al.interval[1] > second.al.interval[0]


def test_a_bin_with_too_few_conversations_has_no_interval(tmp_path: Path) -> None:
    records = [conversation(f"c{i}", "x", told_turn(f"c{i}.0", [1, 2, 2])) for i in range(5)]
    records.append(conversation("long", "x", told_turn("long.0", [1, 2, 2, 3, 3])))
    run = stored(tmp_path / "r", records)
    first, second = position.by_position(seen(run), 5).slices
    assert first.al.interval is not None
    assert second.al.value == 3.0
    assert second.al.interval is None
    assert second.al.why_not


def test_a_lone_conversation_of_a_category_leaves_its_slices_without_an_interval(
    tmp_path: Path,
) -> None:
    """It is in every resample: five alike conversations of x would make an interval of no width
    around a number that half of its steps, those of the only y, decide."""
    records = [conversation(f"c{i}", "x", told_turn(f"c{i}.0", [1, 2, 2, 2])) for i in range(5)]
    records.append(conversation("d", "y", told_turn("d.0", [1, *[1] * 15])))
    first, second, *_ = position.by_position(seen(stored(tmp_path / "r", records)), 5).slices
    assert first.al.value == pytest.approx((10 * 2 + 4) / 14)
    assert second.al_first.value == pytest.approx((10 * 2 + 4) / 14)
    for figure in (first.al, second.al, second.al_first, second.difference):
        assert figure.value is not None
        assert figure.interval is None
        assert (
            figure.why_not == "too few conversations for an interval: a category has a single one"
        )


THINK = (50, 51)


def test_thinking_ends_with_the_last_token_of_its_mark(tmp_path: Path) -> None:
    """Steps begin before the mark's end, or after it; K = 3, every step told."""
    steps = [[1], [2, 3], [4, 50], [51, 5], [6, 7, 8], [9]]
    pairs = [(0, 0), (1, 3), (1, 3), (1, 3), (2, 3), (0, 3)]
    plain = [[1], [2, 3, 50], [52, 51, 50]]
    plain_pairs = [(0, 0), (2, 3), (2, 3)]
    records = [
        ConversationRecord("t", "x", (said("t.0", steps, pairs),)),
        ConversationRecord("n", "x", (said("n.0", plain, plain_pairs),)),
        # A mark that begins at the end of one request and goes on in the next is none.
        ConversationRecord("h", "x", (said("h.0", [[51], [5, 5]], [(0, 0), (1, 3)]),)),
    ]
    run = stored(tmp_path / "r", records)
    tokens = tokens_of(run)
    assert position.think_ends(tokens, THINK).tolist() == [6, -1, -1]
    thinking, answer, neither = position.by_thinking(seen(run), THINK).slices
    assert (thinking.n_steps, answer.n_steps, neither.n_steps) == (3, 2, 3)
    assert thinking.al.value == 2.0
    assert answer.al.value == 2.0
    assert thinking.n_steps + answer.n_steps + neither.n_steps == counted(run).n_decode


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
)
def test_think_ends_are_those_of_a_loop(outputs: list[list[int]], mark: list[int]) -> None:
    ids = np.array([token for one in outputs for token in one], np.int64)
    start = np.append(0, np.cumsum([len(one) for one in outputs]))
    expected = [
        next(
            (i + len(mark) for i in range(len(one)) if one[i : i + len(mark)] == mark),
            -1,
        )
        for one in outputs
    ]
    assert position.think_ends(Tokens(ids, start), mark).tolist() == expected


def test_a_mark_that_nobody_says_is_told(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2])])
    found = position.by_thinking(seen(run), (99,))
    assert found.slices == ()
    assert "no request says" in found.why_not


def test_tokens_that_do_not_fit_the_steps_are_not_laid_over_them(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2])])
    columns = replace(run.columns, n_tokens=run.columns.n_tokens + 1)
    broken = replace(run, columns=columns)
    assert "another number of tokens" in position.by_thinking(seen(broken), (7,)).why_not


def test_think_end_is_ids_or_text() -> None:
    def encode(text: str) -> list[int]:
        return [ord(c) for c in text if c != "?"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    assert think_end_ids("151668", encode, decode) == (151668,)
    assert think_end_ids("1, 2", encode, decode) == (1, 2)
    assert think_end_ids("</", encode, decode) == (60, 47)
    with pytest.raises(UserError, match="makes no token"):
        think_end_ids("??", encode, decode)


def test_a_tokenizer_that_lacks_the_text_is_told_of_not_taken_for_its_unknown_token(
    models: Path,
) -> None:
    """The words of the calibration tokenizer are t0, t1, ...: all others are one token."""
    words = Text(str(models / "word" / "target"))
    known = words.decode([7])
    assert think_end_ids(known, words.encode, words.decode) == (7,)
    with pytest.raises(UserError, match=r"does not have.*its token ids") as error:
        think_end_ids("</think>", words.encode, words.decode)
    assert "\n" not in str(error.value)
    letters = Text(str(models / "bpe" / "target"))
    ids = think_end_ids("</think>", letters.encode, letters.decode)
    assert letters.decode(ids) == "</think>"


# --- draft vocabulary -----------------------------------------------------------------------------


def with_vocabulary(run: Run, kept: Sequence[int], n_tokens: int) -> Run:
    about = {"n_tokens": n_tokens, "source": "d2t"}
    store.write_draft_vocabulary(run.directory, np.array(sorted(kept)), about)
    return run


def answered(
    name: str, category: str, prompt: Sequence[int], known: KnownAnswer, case: Case
) -> ConversationRecord:
    """A conversation whose steps are the closed form's."""
    steps = case.steps(known, prompt)
    pairs = [(step.accepted, step.drafted) for step in steps]
    record = said(f"{name}.0", [s.token_ids for s in steps], pairs, finish="length")
    return ConversationRecord(name, category, (record,))


def test_the_pruned_drafter_against_its_unpruned_twin(tmp_path: Path, models: Path) -> None:
    """Counts by hand from the closed form of the pruned drafter; the prediction near the closed
    form of the same drafter with the whole vocabulary, which knows nothing of it."""
    word = models / "word"
    pruned = read_known_answer(word / "target", word / "eagle3-pruned")
    full = read_known_answer(word / "target", word / "eagle3")
    lines = (word / "target" / "calibration_prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = Tokenizer.from_file(str(word / "target" / "tokenizer.json"))
    prompts = {row["question_id"]: tokenizer.encode(row["turns"][0]).ids for row in rows}
    category_of = {row["question_id"]: row["category"] for row in rows}
    case = Case("EAGLE3", 4, 200, pruned.eos_token_ids)
    records = [
        answered(name, category_of[name], ids, pruned, case) for name, ids in prompts.items()
    ]
    run = stored(tmp_path / "r", records, draft_length=4, config={"output_length": 200})
    assert draft_vocabulary.store(run.directory, str(word / "eagle3-pruned")) == ""
    found = vocabulary.coverage(seen(run), NO_OPTIONS)
    assert found is not None
    assert found.why_not == ""
    assert found.overall is not None
    means = []
    for row in found.by_category:
        mine = [name for name in prompts if category_of[name] == row.name]
        steps = [case.steps(pruned, prompts[name]) for name in mine]
        tokens = [t for request in steps for step in request for t in step.token_ids]
        outside = [t for t in tokens if t % 4 == 0]
        assert (row.n_tokens, row.n_outside) == (len(tokens), len(outside))
        assert row.outside.value == pytest.approx(len(outside) / len(tokens))
        assert row.al.value == pytest.approx(expected_al(steps))
        assert row.predicted_al.value == pytest.approx(predicted_by_hand(steps, 4))
        means.append(expected_al([case.steps(full, prompts[name]) for name in mine]))
    # Cycles are short, so that categories miss by up to a third; their mean misses little.
    assert found.overall.predicted_al.value == pytest.approx(np.mean(means), abs=0.06)
    assert found.overall.al.value is not None
    assert found.overall.al.value < np.mean(means) - 0.6


def predicted_by_hand(requests: Sequence[Sequence[Any]], k: int) -> float:
    """The prediction, step by step: tokens that are no multiple of 4 can be drafted."""
    reached, ended = [0] * (k + 1), [0] * (k + 1)
    for steps in requests:
        for step in steps[1:]:
            shown = len(step.token_ids)
            for at in range(1, min(step.accepted, shown) + 1):  # as far as it is shown
                reached[at] += 1
            if step.accepted < k and shown == step.accepted + 1 and step.token_ids[-1] % 4:
                reached[step.accepted + 1] += 1
                ended[step.accepted + 1] += 1
    al, joint = 1.0, 1.0
    for at in range(1, k + 1):
        joint *= 1 - ended[at] / reached[at]
        al += joint
    return al


def simulated(
    tmp_path: Path, p: float, q: float, k: int, n_steps: int, tell: bool, length: int = 10**9
) -> Run:
    """A drafter that is right with p, on tokens of which a share q (token 0) it cannot draft."""
    generator = np.random.default_rng(5)
    records, left = [], n_steps
    while left > 0:
        steps: list[list[int]] = [[1]]
        pairs = [(0, 0)]
        total, n_mine = 1, min(left, 400)
        while len(steps) <= n_mine and total < length:
            tokens, accepted = [], 0
            while True:
                lacking = generator.random() < q
                tokens.append(0 if lacking else 1)
                if lacking or accepted == k or generator.random() >= p:
                    break
                accepted += 1
            shown = tokens[: length - total]
            steps.append(shown)
            pairs.append((accepted, k))
            total += len(shown)
        left -= len(steps) - 1
        name = f"c{len(records)}"
        record = said(f"{name}.0", steps, pairs if tell else None, finish="length")
        records.append(ConversationRecord(name, "x", (record,)))
    run = stored(tmp_path / "r", records, draft_length=k, config={"output_length": 10**6})
    return with_vocabulary(run, [1], 2)


@pytest.mark.parametrize("tell", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("length", [10**9, 12], ids=["long", "cut"])
def test_the_prediction_is_the_closed_form_where_its_assumption_holds(
    tmp_path: Path, tell: bool, length: int
) -> None:
    """Right with p whatever the token: measured sum (p(1-q))^i, with every token sum p^i."""
    p, q, k = 0.8, 0.15, 4
    run = simulated(tmp_path, p, q, k, 20_000, tell, length)
    found = vocabulary.coverage(seen(run), NO_OPTIONS)
    assert found is not None
    assert found.overall is not None
    overall = found.overall
    al = sum((p * (1 - q)) ** i for i in range(k + 1))
    predicted = sum(p**i for i in range(k + 1))
    # Standard errors of 20,000 steps are about 0.011 and 0.014.
    assert overall.al.value == pytest.approx(al, abs=0.05)
    assert overall.predicted_al.value == pytest.approx(predicted, abs=0.06)
    assert overall.cost.interval is not None
    low, high = overall.cost.interval
    assert low - 0.02 < predicted - al < high + 0.02
    if length > 12:
        # Every output token is drawn alike, so a share q lies outside.
        assert overall.outside.value == pytest.approx(q, abs=0.01)


def test_the_measured_al_is_that_of_the_summary(tmp_path: Path) -> None:
    run = simulated(tmp_path, 0.6, 0.2, 3, 3_000, tell=False, length=40)
    found = vocabulary.coverage(seen(run), NO_OPTIONS)
    assert found is not None
    assert found.overall is not None
    assert found.overall.al.value == summarize(run).lengths["al"].value


def test_the_vocabulary_of_another_drafter_is_found_out(tmp_path: Path) -> None:
    """Token 3 was drafted and accepted: a drafter that lacks it did not run here."""
    records = [
        ConversationRecord(
            f"c{i}", "x", (said(f"c{i}.0", [[1], [3, 2], [2]], [(0, 0), (1, 3), (0, 3)]),)
        )
        for i in range(3)
    ]
    run = with_vocabulary(stored(tmp_path / "r", records), [1, 2], 8)
    found = vocabulary.coverage(seen(run), NO_OPTIONS)
    assert found is not None
    assert found.overall is None
    assert "3 of 3 accepted draft tokens are not in the vocabulary" in found.why_not


def test_a_step_without_a_token_stops_no_report(tmp_path: Path) -> None:
    """Such a step is an error of the records, which a check tells; all tokens here are token 7."""
    records = [conversation(f"a{i}", "x", told_turn(f"a{i}.0", [1, 2, 0])) for i in range(2)]
    run = with_vocabulary(stored(tmp_path / "r", records), [7], 100)
    found = vocabulary.coverage(seen(run), InsightOptions())
    assert found is not None
    assert found.why_not == ""
    assert found.overall is not None
    assert (found.overall.n_tokens, found.overall.n_outside) == (6, 0)


def test_a_cut_off_target_token_is_of_neither_kind(tmp_path: Path) -> None:
    """The engine accepted 2 of 3 but the answer ended after 1: what came instead is not known."""
    cut = said("a.0", [[1], [2, 2, 2, 2], [2]], [(0, 0), (3, 3), (2, 3)])
    run = stored(tmp_path / "r", [ConversationRecord("a", "x", (cut,))])
    found = vocabulary.coverage(seen(with_vocabulary(run, [2], 8)), NO_OPTIONS)
    assert found is not None
    assert found.overall is not None
    # Measured: 4 and 3 tokens. Predicted: position 3 was reached by one step, which went on.
    assert found.overall.al.value == pytest.approx(3.5)
    assert found.overall.predicted_al.value == pytest.approx(4.0)


def test_without_a_stored_vocabulary_the_named_one_is_taken(tmp_path: Path, models: Path) -> None:
    drafter = models / "word" / "eagle3-pruned"
    records = [
        ConversationRecord(f"c{i}", "x", (said(f"c{i}.0", [[1], [4], [4], [5]]),)) for i in range(3)
    ]
    run = stored(tmp_path / "r", records)
    assert vocabulary.coverage(seen(run), NO_OPTIONS) is None
    found = vocabulary.coverage(seen(run), InsightOptions(draft_vocabulary=drafter))
    assert found is not None
    assert found.overall is not None
    assert found.overall.outside.value == 0.5
    assert str(drafter) in found.origin
    full = InsightOptions(draft_vocabulary=models / "word" / "eagle3")
    with pytest.raises(UserError, match="drafts from the whole vocabulary"):
        vocabulary.coverage(seen(run), full)


def test_merged_shards_have_the_vocabulary_of_each(tmp_path: Path) -> None:
    for i in range(2):
        records = [
            ConversationRecord(f"{i}{j}", "x", (said(f"c{j}.0", [[1], [4], [5]]),))
            for j in range(3)
        ]
        with_vocabulary(stored(tmp_path / str(i), records), [1, 5], 8)
    both = merged([tmp_path / "0", tmp_path / "1"])
    found = vocabulary.coverage(seen(both), NO_OPTIONS)
    assert found is not None
    assert found.overall is not None
    assert (found.overall.n_outside, found.overall.n_tokens) == (6, 18)
    store.write_draft_vocabulary(tmp_path / "1", np.array([1]), {"n_tokens": 8, "source": "d2t"})
    with pytest.raises(UserError, match="different draft vocabularies"):
        vocabulary.coverage(seen(both), NO_OPTIONS)


# --- random tokens against real prompts -----------------------------------------------------------


def arm_of(
    tmp: Path, name: str, k_tokens: Sequence[int], step_ns: int, repeats: int = 1, **config: Any
) -> Arm:
    """Conversations with steps of these lengths, each `step_ns` long."""
    runs = []
    for r in range(repeats):
        records = [
            conversation(
                f"{name}{i}", "x", told_turn_of(f"{name}{i}.0", k_tokens, step_ns * (10 + i) // 10)
            )
            for i in range(6)
        ]
        runs.append(stored(tmp / f"{name}{r}", records, config=config))
    return one_arm(*runs, label=name)


def told_turn_of(name: str, lengths: Sequence[int], step_ns: int) -> TurnRecord:
    return turn(name, lengths, told=told(lengths, 3), step_ns=step_ns)


RANDOM = {"dataset": "random", "random_isl": 100}


def test_the_overestimate_is_random_over_real(tmp_path: Path) -> None:
    random = arm_of(tmp_path, "random", [1, 4, 4, 4], 10 * MS, **RANDOM)
    real = arm_of(tmp_path, "real", [1, 2, 2, 2], 10 * MS)
    (found,) = random_tokens.overestimates([real, random])
    assert (found.random, found.real) == ("random", "real")
    assert found.al.value == pytest.approx(2.0)
    assert found.al.interval == pytest.approx((2, 2))
    # 4 tokens a step against 2, in steps of equal lengths: user TPS is twice as high.
    assert found.user_tps.value == pytest.approx(2.0)
    assert found.user_tps.interval is not None
    low, high = found.user_tps.interval
    assert low < 2.0 < high
    assert low > 1.5
    assert high < 2.7
    assert found.lengths == ((5.0, 13.0), (5.0, 7.0))
    assert found.differ == ()


def test_the_overestimate_of_al_is_named_apart_from_a_comparison_s(tmp_path: Path) -> None:
    """Random 3; real 2 and 4 in two categories: 3 over their mean 3 is 1, 3 over their geometric
    mean is 1.06. One is called AL random/real, the other AL ratio."""

    def run_of(name: str, lengths: dict[str, int], **config: Any) -> Run:
        records = [
            conversation(f"{name}{c}{i}", c, told_turn_of(f"{name}{c}{i}.0", [1, n, n, n], MS))
            for c, n in lengths.items()
            for i in range(4)
        ]
        prompts = {"fingerprint": name * 8, "turns": "all", "n_prompts": 8, "tokenizer": "t"}
        return stored(tmp_path / name, records, config=config, prompts=prompts)

    random = one_arm(run_of("random", {"random": 3}, **RANDOM), label="random")
    real = one_arm(run_of("real", {"a": 2, "b": 4}), label="real")
    (found,) = random_tokens.overestimates([real, random])
    assert found.al.value == pytest.approx(1.0)
    (held,) = compare(real, [random], allow=["prompts"]).arms
    assert held.overall.al_ratio.value == pytest.approx(3 / math.sqrt(2 * 4))
    blocks = list(of_arms([real, random]))
    (table,) = (
        block
        for block in blocks
        if isinstance(block, Table) and block.columns[0].header == "Random"
    )
    assert [column.header for column in table.columns][2] == "AL\nrandom/real"
    assert any("overall AL" in note and "geometric" in note for note in table.notes)


def test_steady_output_tps_needs_repeats_for_an_interval(tmp_path: Path) -> None:
    """Starts at 0..5 s, two slots: steady from 1 s to 5 s, in which all tokens but the first two
    conversations' first ones appear."""

    def run_of(name: str, n: int, **config: Any) -> Run:
        records = [
            ConversationRecord(
                f"{name}{i}",
                "x",
                (
                    turn(
                        f"{name}{i}.0",
                        [1, n],
                        times_ns=[i * S + S // 2, i * S + S // 2 + 1],
                        submitted_ns=i * S,
                        told=told([1, n], 3),
                    ),
                ),
            )
            for i in range(6)
        ]
        return stored(tmp_path / name, records, config=config)

    one = random_tokens.overestimate(
        one_arm(run_of("r", 4, **RANDOM)), one_arm(run_of("p", 2))
    ).output_tps
    assert one.value == pytest.approx(5 / 3)
    assert one.interval is None
    assert "repeats" in one.why_not
    two = random_tokens.overestimate(
        one_arm(run_of("r1", 4, **RANDOM), run_of("r2", 4, **RANDOM)),
        one_arm(run_of("p1", 2), run_of("p2", 2)),
    ).output_tps
    assert two.value == pytest.approx(5 / 3)
    assert two.interval == pytest.approx((5 / 3, 5 / 3))


def test_arms_that_differ_in_more_are_named_not_compared(tmp_path: Path) -> None:
    random = arm_of(tmp_path, "random", [1, 4, 4], 10 * MS, concurrency=4, **RANDOM)
    real = arm_of(tmp_path, "real", [1, 2, 2], 10 * MS)
    found = collect([random, real], NO_OPTIONS)
    assert found.overestimates == ()
    assert found.unpaired == (("random", "real", ("concurrency",)),)
    length = arm_of(tmp_path, "length", [1, 4, 4], 10 * MS, ignore_eos=True, **RANDOM)
    (told_,) = collect([length, real], NO_OPTIONS).overestimates
    assert told_.differ == ("ignore_eos",)


# --- savings --------------------------------------------------------------------------------------


def test_minutes_saved_are_those_of_the_same_tokens(tmp_path: Path) -> None:
    """Baseline: 1 token per 60 s. Speculative: 2 tokens per 60 s, 4 of them: 2 of 4 min saved."""
    base = stored(
        tmp_path / "b",
        [conversation(f"c{i}", "x", turn(f"c{i}.0", [1] * 9, step_ns=60 * S)) for i in range(5)],
        draft_length=0,
    )
    spec = stored(
        tmp_path / "s",
        [
            conversation(f"c{i}", "x", told_turn_of(f"c{i}.0", [1, 2, 2], 60 * S))
            for i in [*range(4), 99]
        ],
    )
    arms = grouped([base, spec])
    (found,) = saving.savings(arms)
    assert (found.n_conversations, found.n_tokens) == (4, 16)
    assert found.minutes.value == pytest.approx(4 * 2)
    assert found.baseline_minutes.value == pytest.approx(4 * 4)
    assert found.share.value == pytest.approx(0.5)
    assert found.minutes.interval == pytest.approx((8, 8))


def test_a_baseline_with_other_prompts_saves_nothing(tmp_path: Path) -> None:
    base = stored(tmp_path / "b", [conversation("c", "x", [1, 1])], draft_length=0)
    spec = stored(
        tmp_path / "s",
        [conversation("c", "x", [1, 2])],
        prompts={"fingerprint": "e" * 64, "turns": "all", "tokenizer": "t", "n_prompts": 3},
    )
    assert saving.savings(grouped([base, spec])) == ()


def test_dollars_are_gpu_hours_over_tokens(tmp_path: Path) -> None:
    """2 GPUs for 10 s at 3.6 dollars an hour: 0.02 dollars for 4 tokens, 5000 for a million."""
    records = [conversation("c", "x", [1, 2, 1])]
    run = stored(tmp_path / "r", records, config={"tp_size": 2})
    found = saving.dollars_per_million(one_arm(run), 3.6)
    assert found.value == pytest.approx(5000)
    assert found.interval is None
    again = stored(
        tmp_path / "s", records, config={"tp_size": 2}, sessions=[session(ended_ns=20 * S)]
    )
    both = saving.dollars_per_million(one_arm(run, again), 3.6)
    assert both.value == pytest.approx(7500)
    # Student's t with one degree of freedom: 12.706 standard errors of 2500.
    assert both.interval == pytest.approx((7500 - 12.7062 * 2500, 7500 + 12.7062 * 2500))


def test_without_a_gpu_there_are_no_dollars(tmp_path: Path) -> None:
    run = stored(
        tmp_path / "r",
        [conversation("c", "x", [1, 2])],
        engine={"settings": {"device": "cpu"}},
    )
    found = saving.dollars_per_million(one_arm(run), 3.6)
    assert found.value is None
    assert found.why_not == "the engine used no GPU"


# --- layout ---------------------------------------------------------------------------------------


def titles(blocks: Sequence[Block]) -> list[str]:
    return [block.text for block in blocks if isinstance(block, Heading)]


def text_of(blocks: Sequence[Block]) -> str:
    return "\n".join(
        block.text
        if isinstance(block, (Heading, Paragraph))
        else "\n".join(["|".join(row) for row in block.rows] + list(block.notes))
        if isinstance(block, Table)
        else text_of([block.table])
        if isinstance(block, Chart)
        else ""
        for block in blocks
    )


def test_nothing_is_said_of_what_the_records_do_not_hold(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2, 2])])
    assert list(of_arms([one_arm(run)])) == []
    base = stored(tmp_path / "b", [conversation("a", "x", [1, 1, 1])], draft_length=0)
    assert list(of_arms([one_arm(base)])) == []
    asked = list(of_arms([one_arm(base)], InsightOptions(think_end=(1,))))
    assert "--think_end tells something of a speculative arm" in text_of(asked)
    empty = stored(tmp_path / "e", [])
    assert list(of_arms([one_arm(empty)])) == []


def test_every_insight_is_said_where_there_is_one(tmp_path: Path) -> None:
    spec = with_vocabulary(simulated(tmp_path, 0.8, 0.15, 3, 2_000, True), [1], 2)
    turns = stored(
        tmp_path / "t",
        [
            ConversationRecord(
                f"c{i}",
                "x",
                (told_turn(f"c{i}.0", [1, 2, 2]), told_turn(f"c{i}.1", [1, 3, 3], 1)),
            )
            for i in range(4)
        ],
        config={"concurrency": 3},
    )
    base = stored(
        tmp_path / "b",
        [conversation(f"c{i}", "x", [1, 1, 1]) for i in range(4)],
        draft_length=0,
        config={"output_length": 10**6},
    )
    random = arm_of(tmp_path, "random", [1, 4, 4], 10 * MS, concurrency=3, **RANDOM)
    arms = [
        one_arm(spec, label="spec"),
        one_arm(turns, label="turns"),
        one_arm(base, label="base"),
        random,
    ]
    options = InsightOptions(think_end=(0,), gpu_hour_price=2.0, bin_tokens=100)
    blocks = list(of_arms(arms, options))
    assert titles(blocks) == [
        "Draft vocabulary",
        "Random tokens against real prompts",
        "AL along the answer",
        "What speculation saves",
    ]
    text = text_of(blocks)
    assert "the drafter can draft 1 of 2 tokens" in text
    assert "nan" not in text
    assert "None" not in text
    charts = [block.id for block in blocks if isinstance(block, Chart)]
    assert len(charts) == len(set(charts)) == 4
    for block in blocks:
        if isinstance(block, Chart):
            for series in block.series:
                assert len(series.x) == len(series.y) == len(series.low) == len(series.high)
            assert not math.isnan(sum(block.series[0].y[:1]))


def test_a_damaged_part_spoils_its_own_insight_only(tmp_path: Path) -> None:
    records = [conversation(f"c{i}", "x", told_turn(f"c{i}.0", [1, 2, 2, 3])) for i in range(3)]
    run = stored(tmp_path / "r", records)
    (run.directory / store.DRAFT_VOCABULARY_FILE).write_bytes(b"PAR1 not")
    (run.directory / "experts").mkdir()
    (run.directory / "experts" / "00000.parquet").write_bytes(b"PAR1 not")
    found = collect([one_arm(run)], InsightOptions(bin_tokens=3))
    assert len(found.faults) == 2
    assert all("restore it" in fault for fault in found.faults)
    assert len(found.by_position) == 1
    assert found.coverage == ()
    assert found.experts == ()


def test_the_weights_are_those_of_the_reports(tmp_path: Path) -> None:
    """The pooled AL of one slice that holds everything has al_step's value and interval."""
    records = [
        conversation(f"{c}{i}", c, told_turn(f"{c}{i}.0", [1, 1 + i % 4, 2, 3]))
        for c in "xy"
        for i in range(7)
    ]
    run = stored(tmp_path / "r", records)
    (only,) = position.by_position(seen(run), 10**6).slices
    summary = summarize(run).lengths["al_step"]
    assert only.al.value == pytest.approx(summary.value)
    assert only.al.interval == pytest.approx(summary.interval)
    weights = stats.bootstrap_weights(counted(run).category)
    resampled = metrics.acceptance_lengths(counted(run), weights)["al_step"].overall
    assert np.isfinite(resampled).all()
