"""Losslessness: shares and positions with known answers, intervals, an exact two-sample test."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from speedbench import lossless
from speedbench.lossless import (
    CLOSE,
    Answer,
    Answers,
    Greedy,
    Sampled,
    answer,
    answers,
    first_difference,
    greedy,
    losslessness,
    rejects,
    sampled,
    wilson,
)
from speedbench.permutation import PValue, holm, swap_test, token_distances
from speedbench.report.blocks import Chart, Paragraph, Table
from speedbench.report.layout_lossless import of_losslessness
from speedbench.types import ConversationRecord, Step, TurnRecord
from tests.builders import stored

Tokens = Sequence[int]


def ids(tokens: Tokens) -> np.ndarray:
    return np.array(tokens, np.int32)


def answered(
    outputs: Mapping[tuple[str, int], Tokens],
    *,
    prompts: Mapping[tuple[str, int], str] | None = None,
    categories: Mapping[str, str] | None = None,
) -> Answers:
    """Answers of one run; every prompt is the same in all runs unless `prompts` says otherwise."""
    return {
        key: answer(
            (categories or {}).get(key[0], "qa"), (prompts or {}).get(key, "p"), ids(tokens)
        )
        for key, tokens in outputs.items()
    }


def hashes_only(run: Answers) -> Answers:
    return {
        key: Answer(a.category, a.prompt_sha256, a.n_tokens, a.sha256) for key, a in run.items()
    }


def same_and_other(n: int, n_other: int, at: int = 3) -> tuple[Answers, Answers]:
    """n requests of five tokens; in the second run n_other of them differ from token `at` on."""
    mine = {(f"c{i:03d}", 0): [i, 2, 3, 4, 5] for i in range(n)}
    theirs = {
        key: [*tokens[: at - 1], *(t + 100 for t in tokens[at - 1 :])] if i < n_other else tokens
        for i, (key, tokens) in enumerate(mine.items())
    }
    return answered(mine), answered(theirs)


# --- stored outputs -------------------------------------------------------------------------------


def record(name: str, turns: Sequence[tuple[str, list[list[int]], str]]) -> ConversationRecord:
    """turns: (prompt hash, tokens of each step, finish reason)."""
    made = []
    for number, (prompt, steps, reason) in enumerate(turns):
        request = f"{name}.{number}"
        last = len(steps) - 1
        made.append(
            TurnRecord(
                request, number, 4, prompt, 0, reason, "it broke" if reason == "error" else None,
                [Step(request, 10 + i, tokens, finish_reason=reason if i == last else None)
                 for i, tokens in enumerate(steps)],
            )
        )  # fmt: skip
    return ConversationRecord(name, "qa", tuple(made))


def test_answers_are_read_from_a_stored_run(tmp_path: Path) -> None:
    run = stored(
        tmp_path / "run",
        [
            record("b", [("p0", [[5], [6, 7]], "stop"), ("p1", [[9]], "length")]),
            record("a", [("p2", [[1]], "stop"), ("p3", [[2]], "error")]),
        ],
    )
    found = answers(run)
    assert sorted(found) == [("a", 0), ("b", 0), ("b", 1)]  # the failed turn is no answer
    one = found["b", 0]
    assert one.token_ids is not None
    assert one.token_ids.tolist() == [5, 6, 7]
    assert (one.category, one.prompt_sha256, one.n_tokens) == ("qa", "p0", 3)
    by_hand = bytes([5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0])
    assert one.sha256 == hashlib.sha256(by_hand).hexdigest()
    assert found["b", 1].token_ids.tolist() == [9]  # type: ignore[union-attr]


# --- shares ---------------------------------------------------------------------------------------


def test_a_known_share_of_outputs_is_identical() -> None:
    mine, theirs = same_and_other(20, 5)
    found = greedy([mine], [theirs])
    assert (found.overall.n_compared, found.overall.n_identical) == (20, 15)
    assert found.overall.share.value == pytest.approx(0.75)


def test_independent_requests_have_wilson_s_interval() -> None:
    # Wilson 1927 for 15 of 20, worked out by hand with z = 1.959964.
    z2 = 1.959963984540054**2
    centre, half = (15 + z2 / 2) / (20 + z2), (z2**0.5 / (20 + z2)) * (15 * 5 / 20 + z2 / 4) ** 0.5
    found = greedy(*([one] for one in same_and_other(20, 5))).overall.share
    assert found.interval == pytest.approx((centre - half, centre + half), rel=1e-12)
    assert wilson(1.0, 10)[1] == 1.0
    assert wilson(1.0, 10)[0] == pytest.approx(10 / (10 + z2))
    assert wilson(0.0, 10) == pytest.approx((0.0, z2 / (10 + z2)))


def test_turns_of_one_conversation_are_no_independent_requests() -> None:
    """Ten conversations of four turns that all go one way know no more than ten requests."""
    turns = {(f"c{i}", t): [i, t] for i in range(10) for t in range(4)}
    other = {key: [i + 50] if key[0] < "c3" else list(tokens) for (key, tokens), i in zip(
        turns.items(), range(40), strict=True)}  # fmt: skip
    found = greedy([answered(turns)], [answered(other)]).overall
    assert (found.n_compared, found.n_identical) == (40, 28)
    ten = greedy(*([one] for one in same_and_other(10, 3))).overall.share
    assert found.share.interval is not None
    assert ten.interval is not None
    assert found.share.value == pytest.approx(0.7)
    assert found.share.interval[0] < ten.interval[0]
    assert found.share.interval[1] > ten.interval[1]


def test_repeats_of_a_run_are_no_more_requests() -> None:
    mine, theirs = same_and_other(20, 5)
    once = greedy([mine], [theirs]).overall.share
    often = greedy([mine] * 4, [theirs] * 3).overall
    assert often.n_compared == 240
    assert often.share.value == pytest.approx(0.75)
    assert often.share.interval is not None
    assert once.interval is not None
    assert often.share.interval[0] <= once.interval[0]


def test_few_identical_outputs_leave_room_for_doubt() -> None:
    """A bootstrap would say 100 % to 100 %; of ten, one in four may still differ."""
    found = greedy(*([one] for one in same_and_other(10, 0))).overall.share
    assert found.value == 1
    assert found.interval is not None
    assert 0.65 < found.interval[0] < 0.8


def test_over_all_is_the_mean_over_categories() -> None:
    categories = {f"c{i}": "a" if i < 4 else "b" for i in range(20)}
    mine = {(name, 0): [1] for name in categories}
    theirs = {(name, 0): [2] if name in ("c0", "c1") else [1] for name in categories}
    found = greedy(
        [answered(mine, categories=categories)], [answered(theirs, categories=categories)]
    )
    assert [(row.name, row.share.value) for row in found.by_category] == [("a", 0.5), ("b", 1.0)]
    assert found.overall.share.value == pytest.approx(0.75)
    assert (found.overall.n_identical, found.overall.n_compared) == (18, 20)


def test_only_the_very_same_prompt_is_compared() -> None:
    """A live history parts after the first turn: what follows says nothing of the arm."""
    mine = answered({("c", 0): [1], ("c", 1): [2], ("d", 0): [3], ("d", 1): [4]})
    theirs = answered(
        {("c", 0): [9], ("c", 1): [8], ("d", 0): [3], ("d", 1): [4]}, prompts={("c", 1): "other"}
    )
    found = greedy([mine], [theirs])
    assert (found.overall.n_compared, found.overall.n_identical) == (3, 2)
    assert found.overall.n_left_out == 1


def test_an_answer_without_counterpart_is_counted() -> None:
    mine, theirs = same_and_other(5, 0)
    short = {key: one for key, one in theirs.items() if key[0] != "c001"}
    found = greedy([mine], [short])
    assert (found.n_missing, found.overall.n_compared) == (1, 4)


def test_a_category_that_was_asked_on_one_side_only_is_no_number() -> None:
    mine = answered({("c", 0): [1], ("d", 0): [1]}, categories={"d": "rag"})
    found = greedy([mine], [answered({("c", 0): [1]})])
    assert found.overall.share.value is None
    assert "rag" in found.overall.share.why_not
    assert found.verdict.kind == "unknown"


# --- the floor ------------------------------------------------------------------------------------


def test_one_baseline_run_is_no_floor_and_says_what_to_do() -> None:
    mine, theirs = same_and_other(20, 5)
    found = greedy([mine], [theirs])
    assert found.overall.floor.value is None
    assert "--repeat 2" in found.overall.floor.why_not
    assert found.overall.difference.value is None
    assert found.verdict.kind == "unknown"
    assert "--repeat 2" in found.verdict.sentence


def test_all_identical_needs_no_floor() -> None:
    found = greedy(*([one] for one in same_and_other(20, 0)))
    assert found.verdict.kind == "same"
    assert "All 20 outputs" in found.verdict.sentence


def test_the_floor_is_the_share_between_every_two_baseline_runs() -> None:
    first, second = same_and_other(20, 2)
    _, third = same_and_other(20, 4)
    # Of 20: first and second share 18, first and third 16; where both differ they differ alike.
    found = greedy([first, second, third], [first])
    assert found.overall.floor.value == pytest.approx((18 + 16 + 18) / 60)
    assert found.overall.share.value == pytest.approx((20 + 18 + 16) / 60)
    assert found.floor_positions.n_compared == 60
    assert found.overall.difference.value == pytest.approx(2 / 60)


def test_an_arm_like_the_baseline_is_no_worse_than_its_floor() -> None:
    first, second = same_and_other(400, 8)
    found = greedy([first, second], [second])
    assert found.verdict.kind == "no more"
    assert "1.0 % against 2.0 %" in found.verdict.sentence


def test_an_arm_that_differs_more_is_told_with_both_figures() -> None:
    first, second = same_and_other(200, 4)
    _, third = same_and_other(200, 60)
    found = greedy([first, second], [third])
    # Against the first run 60 differ, against the second 56.
    assert found.verdict.kind == "more"
    assert "29.0 % against 2.0 %" in found.verdict.sentence
    assert found.overall.difference.value == pytest.approx(-0.27)
    assert found.overall.difference.interval is not None
    assert found.overall.difference.interval[1] < 0


def test_the_difference_is_newcombe_s_of_pairs() -> None:
    """41 pairs: 14 alike on both sides, 5 on the first alone, 22 on neither. Altman et al. 2000,
    Statistics with Confidence, table 6.2; the bounds by hand: Wilson's of 19 / 41 and of 14 / 41,
    phi = (14 * 22 - 0 * 5 - 41 / 2) / sqrt(19 * 22 * 14 * 27), corrected for continuity."""
    names = {f"c{i:03d}": "qa" for i in range(41)}
    base, _ = same_and_other(41, 0)
    other = {key: answer("qa", "p", ids([-1])) for key in base}

    def share(n_same: int) -> lossless._Share:
        mixed = {key: (base if i < n_same else other)[key] for i, key in enumerate(sorted(base))}
        tally = lossless._Tally.of([(base, mixed)], names)
        return lossless._Share.of([np.arange(41)], ["qa"], tally)

    def wilson_by_hand(n_same: int) -> tuple[float, float]:
        z, p = 1.959963984540054, n_same / 41
        half = z * math.sqrt(p * (1 - p) / 41 + z * z / (4 * 41 * 41))
        return tuple((p + z * z / 82 + sign * half) / (1 + z * z / 41) for sign in (-1, 1))  # type: ignore[return-value]

    (low_a, high_a), (low_b, high_b) = wilson_by_hand(19), wilson_by_hand(14)
    a, b, phi = 19 / 41, 14 / 41, (308 - 20.5) / math.sqrt(19 * 22 * 14 * 27)
    down = (a - low_a) ** 2 + (high_b - b) ** 2 - 2 * phi * (a - low_a) * (high_b - b)
    up = (high_a - a) ** 2 + (b - low_b) ** 2 - 2 * phi * (high_a - a) * (b - low_b)
    found = lossless._difference(share(19), share(14))
    assert found.value == pytest.approx(5 / 41)
    assert found.interval == pytest.approx((5 / 41 - math.sqrt(down), 5 / 41 + math.sqrt(up)))
    assert found.interval == pytest.approx((0.011, 0.226), abs=1e-3)  # as printed there


def test_too_few_to_tell() -> None:
    first, second = same_and_other(12, 1)
    _, third = same_and_other(12, 2)
    found = greedy([first, second], [third])
    assert found.verdict.kind == "unknown"
    low, high = found.overall.difference.interval or (0, 0)
    assert low < -CLOSE
    assert high > 0


def drawn(rng: np.random.Generator, noise: np.ndarray, n_turns: int, n_categories: int) -> Answers:
    """A run in which conversation i's replies leave the common one with probability noise[i]."""
    return {
        (f"c{i:03d}", t): Answer(
            f"g{i % n_categories}",
            "p",
            1,
            "usual" if rng.random() >= p else str(rng.integers(1 << 40)),
        )
        for i, p in enumerate(noise)
        for t in range(n_turns)
    }


@pytest.mark.parametrize(("n_turns", "n_categories", "n_base"), [(1, 1, 2), (2, 3, 2), (1, 4, 3)])
def test_intervals_hold_the_truth(n_turns: int, n_categories: int, n_base: int) -> None:
    """Conversations differ in how noisy they are (beta), so that their comparisons cluster."""
    rng = np.random.default_rng(n_turns * 10 + n_categories)
    a, b, n = 0.4, 3.6, 60  # mean 0.1
    mean, second = a / (a + b), a * (a + 1) / ((a + b) * (a + b + 1))
    floor = 1 - 2 * mean + second
    share = 1 - 3 * mean + 2 * second  # the arm leaves twice as often, capped nowhere near
    hits = np.zeros(3)
    trials = 200
    for _ in range(trials):
        noise = rng.beta(a, b, n)
        arm_noise = 2 * noise  # above 1 with probability 0.002: of no account here
        base = [drawn(rng, noise, n_turns, n_categories) for _ in range(n_base)]
        found = greedy(base, [drawn(rng, arm_noise, n_turns, n_categories)]).overall
        for i, (figure, truth) in enumerate(
            ((found.share, share), (found.floor, floor), (found.difference, share - floor))
        ):
            low, high = figure.interval or (2, 2)
            hits[i] += low <= truth <= high
    assert (hits / trials > 0.90).all()  # 95 % less three standard errors
    assert (hits / trials <= 0.995).all()


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "number"),
    [
        ([1, 2, 3], [9, 2, 3], 1),
        ([1, 2, 3], [1, 2, 9], 3),
        ([1, 2, 3], [1, 2], 3),
        ([1, 2], [1, 2, 3, 4], 3),
        ([], [4], 1),
    ],
)
def test_first_difference(mine: Tokens, theirs: Tokens, number: int) -> None:
    assert first_difference(ids(mine), ids(theirs)) == number


def test_positions_of_divergence_are_counted() -> None:
    tokens = list(range(10))

    def parting(at: int) -> list[int]:
        return [*tokens[: at - 1], *(t + 50 for t in tokens[at - 1 :])]

    mine = answered({(f"c{i}", 0): tokens for i in range(8)})
    parts = {0: 1, 1: 4, 2: 4, 3: 10}
    theirs = answered({(f"c{i}", 0): parting(parts[i]) if i in parts else tokens for i in range(8)})
    found = greedy([mine], [theirs]).positions
    assert (found.n_compared, found.n_diverged, found.first) == (8, 4, 1)
    assert found.at == (1, 4, 10)
    assert found.share == pytest.approx((7 / 8, 5 / 8, 4 / 8))
    # Linear interpolation of 1, 4, 4, 10.
    assert found.quantiles == pytest.approx({25: 3.25, 50: 4.0, 75: 5.5})


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    n = 1000
    mine = answered({(f"c{i:04d}", 0): list(range(n + 1)) for i in range(n)})
    theirs = answered({(f"c{i:04d}", 0): [*range(i), -1, *range(i + 1, n + 1)] for i in range(n)})
    found = greedy([mine], [theirs]).positions
    assert len(found.at) == 200
    assert (found.at[0], found.at[-1]) == (1, n)
    for at, share in zip(found.at, found.share, strict=True):
        assert share == pytest.approx(1 - at / n)


def test_hashes_tell_what_is_identical_but_not_where_it_parts() -> None:
    mine, theirs = same_and_other(20, 5)
    found = greedy([hashes_only(mine)], [theirs])
    assert found.overall.share.value == pytest.approx(0.75)
    assert found.positions.first is None
    assert "hashes" in found.positions.why_not
    assert (found.positions.n_diverged, found.positions.at) == (5, ())


# --- the two-sample test --------------------------------------------------------------------------


def brute_force(distances: np.ndarray) -> float:
    """p of the swap test, every arrangement written out."""
    n = len(distances)
    values = []
    for signs in itertools.product((1, -1), repeat=n):
        values.append(
            sum(signs[i] * signs[j] * distances[i, j] for i in range(n) for j in range(n))
        )
    return sum(value >= values[0] - 1e-9 for value in values) / 2**n


@pytest.mark.parametrize("seed", range(5))
def test_p_is_that_of_all_permutations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gaps = rng.normal(size=(9, 4)) + 0.4
    distances = gaps @ gaps.T
    found = swap_test(distances)
    assert (found.exact, found.n_permutations) == (True, 512)
    assert found.value == pytest.approx(brute_force(distances))


def test_drawn_permutations_come_close_to_all_of_them() -> None:
    rng = np.random.default_rng(7)
    gaps = rng.normal(size=(12, 4)) + 0.3
    distances = gaps @ gaps.T
    exact = swap_test(distances)
    drawn = swap_test(distances, n_permutations=3000)
    assert (exact.exact, drawn.exact, drawn.n_permutations) == (True, False, 3000)
    assert exact.value is not None
    error = (exact.value * (1 - exact.value) / 3000) ** 0.5
    assert drawn.value == pytest.approx(exact.value, abs=4 * error)
    assert swap_test(distances, n_permutations=3000) == drawn  # seeded


@pytest.mark.parametrize("n", [7, 40])
def test_a_sum_is_swapped_as_its_square_is(n: int) -> None:
    gap = np.random.default_rng(n).normal(size=n) + 0.2
    assert swap_test(gap) == swap_test(np.outer(gap, gap))


def test_all_one_way_is_as_rare_as_it_can_be() -> None:
    """Eight equal gaps: only all swapped, or none, is as far: 2 of 256."""
    assert swap_test(np.ones((8, 8))).value == pytest.approx(2 / 256)


def test_no_difference_at_all_has_p_1() -> None:
    assert swap_test(np.zeros((5, 5))).value == 1
    assert swap_test(np.zeros((50, 50))).value == 1


def test_token_distances_by_hand() -> None:
    pairs = [(ids([1, 1, 2]), ids([1, 2, 2])), (ids([3]), ids([2]))]
    # Counts in all: token 1: 3, token 2: 4, token 3: 1. Gaps (second less first):
    # conversation 0: 1 -> -1, 2 -> +1; conversation 1: 2 -> +1, 3 -> -1.
    assert token_distances(pairs) == pytest.approx(
        np.array([[1 / 3 + 1 / 4, 1 / 4], [1 / 4, 1 / 4 + 1]])
    )


def test_holm_by_hand() -> None:
    tests = [PValue(p, p, 1, True) for p in (0.04, 0.01, 0.03)] + [PValue(None, None, 0, False)]
    assert [one.adjusted for one in holm(tests)] == [
        pytest.approx(0.06), pytest.approx(0.03), pytest.approx(0.06), None,
    ]  # fmt: skip


def chatter(
    rng: np.random.Generator, n: int, p: Sequence[float], length: float, n_turns: int = 1
) -> Answers:
    """Random answers: tokens by the probabilities p, lengths Poisson around `length`."""
    outputs = {
        (f"c{i:03d}", t): rng.choice(len(p), size=1 + rng.poisson(length), p=p).tolist()
        for i in range(n)
        for t in range(n_turns)
    }
    prompts = {key: "first" if key[1] == 0 else str(rng.integers(1 << 40)) for key in outputs}
    return answered(outputs, prompts=prompts)


EVEN = (0.25, 0.25, 0.25, 0.25)
SKEWED = (0.40, 0.20, 0.20, 0.20)


def test_the_test_finds_other_tokens() -> None:
    rng = np.random.default_rng(1)
    found = sampled([chatter(rng, 40, EVEN, 40)], [chatter(rng, 40, SKEWED, 40)])
    assert found.verdict.kind == "more"
    assert found.overall.tokens.value is not None
    assert found.overall.tokens.value < 0.001
    assert found.overall.tokens.n_permutations == 9999
    assert found.check is None
    assert "--repeat 2" in found.why_no_check


def test_the_test_finds_other_lengths() -> None:
    rng = np.random.default_rng(2)
    found = sampled([chatter(rng, 40, EVEN, 40)], [chatter(rng, 40, EVEN, 50)])
    assert found.overall.lengths.value is not None
    assert found.overall.lengths.value < 0.001
    assert found.verdict.kind == "more"


def test_of_alike_arms_it_rejects_one_in_twenty() -> None:
    """Exact under the null, however long and clustered the answers are: live histories, too."""
    rng = np.random.default_rng(3)
    p = []
    for _ in range(300):
        found = sampled(
            [chatter(rng, 8, SKEWED, 6, n_turns=2)], [chatter(rng, 8, SKEWED, 6, n_turns=2)]
        )
        p.append((found.overall.tokens.value, found.overall.lengths.value))
    for level in (0.05, 0.2, 0.5):
        rate = (np.array(p, float) <= level + 1e-12).mean(axis=0)
        error = (level * (1 - level) / 300) ** 0.5
        assert (rate <= level + 3 * error).all()
        assert (rate >= level - 4 * error - 2 / 256).all()


def test_baseline_against_baseline_checks_the_test() -> None:
    rng = np.random.default_rng(4)
    base = [chatter(rng, 30, EVEN, 40), chatter(rng, 30, EVEN, 40)]
    found = sampled(base, [chatter(rng, 30, SKEWED, 40)])
    assert found.check is not None
    assert not rejects(found.check)
    assert found.verdict.kind == "more"
    odd = sampled(
        [base[0], chatter(rng, 30, SKEWED, 40)], [chatter(rng, 30, (0.1, 0.1, 0.1, 0.7), 40)]
    )
    assert odd.check is not None
    assert rejects(odd.check)
    assert odd.verdict.kind == "unknown"
    assert "two baseline runs" in odd.verdict.sentence


def test_repeats_under_one_seed_are_swapped_together() -> None:
    """Two runs of an arm that are copies are one sample: p must not fall by repeating them."""
    rng = np.random.default_rng(5)
    mine, theirs = chatter(rng, 9, EVEN, 10), chatter(rng, 9, SKEWED, 10)
    once, twice = sampled([mine], [theirs]), sampled([mine] * 2, [theirs] * 2)
    assert twice.n_rounds == 2
    assert once.overall.tokens.value == pytest.approx(twice.overall.tokens.value)
    assert once.overall.lengths.value == pytest.approx(twice.overall.lengths.value)


def test_conversations_not_answered_by_all_are_left_out() -> None:
    rng = np.random.default_rng(6)
    mine, theirs = chatter(rng, 10, EVEN, 10, n_turns=2), chatter(rng, 10, EVEN, 10, n_turns=2)
    short = {key: one for key, one in theirs.items() if key != ("c003", 1)}
    found = sampled([mine], [short])
    assert (found.n_left_out, found.overall.n_conversations) == (1, 9)


def test_unchanged_answers_are_counted() -> None:
    rng = np.random.default_rng(8)
    mine = chatter(rng, 10, EVEN, 10)
    found = sampled([mine], [mine])
    assert found.overall.n_unchanged == 10
    assert (found.overall.tokens.value, found.overall.lengths.value) == (1, 1)
    assert found.verdict.kind == "unseen"


def test_hashes_still_tell_lengths_apart() -> None:
    rng = np.random.default_rng(9)
    found = sampled([hashes_only(chatter(rng, 30, EVEN, 40))], [chatter(rng, 30, EVEN, 60)])
    assert found.overall.tokens.value is None
    assert "hashes" in found.overall.tokens.why_not
    assert found.verdict.kind == "more"


def test_one_conversation_cannot_be_swapped() -> None:
    rng = np.random.default_rng(10)
    found = sampled([chatter(rng, 1, EVEN, 40)], [chatter(rng, 1, EVEN, 60)])
    assert found.overall.tokens.value is None
    assert found.verdict.kind == "unknown"


def test_temperature_chooses_the_method() -> None:
    mine, theirs = same_and_other(6, 1)
    assert isinstance(losslessness([mine], [theirs], 0.0), Greedy)
    assert isinstance(losslessness([mine], [theirs], 0.7), Sampled)


# --- layout ---------------------------------------------------------------------------------------


def test_the_report_says_the_share_with_its_interval_and_why_there_is_no_floor() -> None:
    mine, theirs = same_and_other(20, 5)
    blocks = list(of_losslessness([("EAGLE3 K=3", greedy([mine], [theirs]))]))
    table = next(block for block in blocks if isinstance(block, Table))
    assert table.rows[-1][:4] == ("Overall", "15 of 20", "75.0 %", "53.1 %-88.8 %")
    assert table.rows[-1][4:] == ("n/a",) * 4
    assert any("--repeat 2" in note for note in table.notes)
    chart = next(block for block in blocks if isinstance(block, Chart))
    positions = [block for block in blocks if isinstance(block, Table)][1]
    assert positions.rows[0] == ("EAGLE3 K=3", "5 of 20", "3", "3", "3", "3")
    assert chart.table.rows == (("0", "100.00"), ("3", "75.00"))  # every corner of the curve
    assert "5 of 20 differ" in chart.alt
    (series,) = chart.series
    assert series.x == (0, 3, 3)
    assert series.y == (100, 75, 75)


def test_the_report_of_a_sampled_arm_tells_p_and_what_it_cannot_see() -> None:
    rng = np.random.default_rng(1)
    base = [chatter(rng, 40, EVEN, 40), chatter(rng, 40, EVEN, 40)]
    blocks = list(of_losslessness([("arm", sampled(base, [chatter(rng, 40, SKEWED, 40)]))]))
    table = next(block for block in blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["qa", "baseline against itself", "Overall"]
    assert table.rows[-1][3] == "0.0001"
    assert any("9999 random permutations" in note for note in table.notes)
    words = [block for block in blocks if isinstance(block, Paragraph)]
    assert words[0].style == "error"
    assert any("cannot see" in block.text for block in words)
