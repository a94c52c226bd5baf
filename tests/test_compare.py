"""Comparisons: closed forms, a brute-force twin of every figure, refusals, repeats, the page."""

from __future__ import annotations

import io
import math
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import chi2, t

from speedbench import store
from speedbench.report import console, html, markdown, sample
from speedbench.report.arms import Arm, load_arms
from speedbench.report.blocks import Chart, Facts, Heading, Table
from speedbench.report.compare import ArmComparison, Comparison, compare, significant
from speedbench.report.layout_compare import of_comparison
from speedbench.report.sample import Sample, SampleRun
from speedbench.report.sides import Measured
from speedbench.report.summary import Figure
from speedbench.store import Run
from speedbench.types import Served, UserError
from tests.builders import MS, S, conversation, stored, turn
from tests.test_metrics import twin

# --- arms -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A conversation: of each turn, the tokens of its decode steps, and how long they take; the
    i-th turn's TTFT is i times `ttft_ns`."""

    category: str
    turns: Sequence[Sequence[int]]
    step_ns: int = 10 * MS
    prompt: str = "00"
    engine_steps: Sequence[int] = ()
    ttft_ns: int = 50 * MS
    failed: bool = False


def run_of(directory: Path, k: int, rows: Mapping[str, Row], **about: Any) -> Run:
    records = []
    for name, row in rows.items():
        turns = []
        for i, decode in enumerate(row.turns):
            made = turn(
                f"{name}.{i}",
                [1, *decode],
                number=i,
                submitted_ns=i * S,
                ttft_ns=(i + 1) * row.ttft_ns,
                step_ns=row.step_ns,
                engine_steps=[1, *row.engine_steps] if row.engine_steps else None,
                finish="error" if row.failed else "stop",
            )
            turns.append(replace(made, prompt_sha256=row.prompt))
        records.append(conversation(name, row.category, *turns))
    return stored(directory, records, draft_length=k, **about)


def only(comparison: Comparison) -> ArmComparison:
    (one,) = comparison.arms
    return one


def uniform(
    k: int, *, n: int = 4, step_ns: int = 10 * MS, names: Sequence[str] = "ab", **change: Row
) -> dict[str, Row]:
    """20 tokens after the first in each of n conversations of every category: steps of one token,
    or of 1, 2, 3, 4, 1, 2, 3, 4, of which the last one is not cut; AL is then 2.5."""
    decode = [1, 2, 3, 4] * 2 if k else [1] * 20
    rows = {f"{c}{i}": Row(c, [decode], step_ns) for c in names for i in range(n)}
    return {**rows, **change}


def arm_of(*runs: Run, label: str = "arm") -> Arm:
    return Arm(label, runs)


def rows_of(one: ArmComparison) -> dict[str, Any]:
    return {row.name: row for row in (*one.by_category, one.overall)}


# --- closed forms ---------------------------------------------------------------------------------


def test_a_constant_ratio_is_exactly_that_without_any_width(tmp_path: Path) -> None:
    """20 tokens in 20 steps of 10 ms, or in 8 of 15 ms: 200 / 120 = 5 / 3 = 2.5 / 1.5."""
    one = only(
        compare(
            arm_of(run_of(tmp_path / "b", 0, uniform(0))),
            [arm_of(run_of(tmp_path / "s", 3, uniform(3, step_ns=15 * MS)))],
        )
    )
    for name, row in rows_of(one).items():
        expected = {
            "al_base": 1.0, "al": 2.5, "al_ratio": 2.5, "user_tps": 5 / 3, "step_time": 1.5,
            "predicted": 5 / 3, "residual": 1.0,
        }  # fmt: skip
        for figure, value in expected.items():
            found = getattr(row, figure)
            assert found.value == pytest.approx(value), (name, figure)
            assert found.interval == pytest.approx((value, value)), (name, figure)
        assert row.n_pairs == row.n_base == row.n == (8 if name == "Overall" else 4)
    assert one.overall.residual.value == 1.0  # exactly: no rounding makes it significant
    assert significant(one.overall.residual) is False
    assert one.paired
    assert one.n_left_out == {}
    assert [c.sentence for c in one.checks if "identical" in c.sentence] == [
        "all 8 prompts were identical in both arms, token by token"
    ]


def test_two_categories_by_hand(tmp_path: Path) -> None:
    """Category a: twice and 8 times as fast, so 4 times; b: 9 times; overall 6 times.

    On logarithms the standard error of a is ln 2, with one degree of freedom; of b 0. The overall
    one is half of a's, and with Welch's degrees (S^2 / (v^2 / 3) - 2 with S = v) again one.
    """

    def rows(times: Sequence[int]) -> dict[str, Row]:
        names = ("a0", "a1", "b0", "b1", "b2")
        return {
            name: Row(name[0], [[1] * 10], ms * MS) for name, ms in zip(names, times, strict=True)
        }

    one = only(
        compare(
            arm_of(run_of(tmp_path / "b", 0, rows([80, 80, 90, 9, 9]))),
            [arm_of(run_of(tmp_path / "s", 0, rows([40, 10, 10, 1, 1])))],
        )
    )
    found = rows_of(one)
    t1 = float(t.ppf(0.975, 1))
    assert found["a"].user_tps.value == pytest.approx(4)
    assert found["a"].user_tps.interval == pytest.approx((4 / 2**t1, 4 * 2**t1))
    assert found["b"].user_tps.value == pytest.approx(9)
    assert found["b"].user_tps.interval == pytest.approx((9, 9))
    assert found["Overall"].user_tps.value == pytest.approx(6)
    assert found["Overall"].user_tps.interval == pytest.approx(
        (6 / 2 ** (t1 / 2), 6 * 2 ** (t1 / 2))
    )
    assert found["a"].step_time.value == pytest.approx(1 / 4)
    assert found["a"].al_ratio.value == 1.0
    half = math.log(2) * t1 / 2
    least = math.expm1(half * (1 + 0.8416212335729143 / 1.959963984540054))
    assert one.detectable.value == pytest.approx(least)


def test_the_residual_is_what_cut_last_steps_cost(tmp_path: Path) -> None:
    """Every draft of 3 is accepted, an answer ends after 6 decode tokens: 4, and 2 of 4 are seen.

    AL is 4 (no step was seen to be rejected), 2 steps show 6 tokens: 3 per step, residual 3 / 4.
    """
    rows = {f"a{i}": Row("a", [[4, 2]]) for i in range(3)}
    base = {f"a{i}": Row("a", [[1] * 6]) for i in range(3)}
    one = only(
        compare(arm_of(run_of(tmp_path / "b", 0, base)), [arm_of(run_of(tmp_path / "s", 3, rows))])
    )
    assert one.overall.al_ratio.value == pytest.approx(4)
    assert one.overall.user_tps.value == pytest.approx(3)
    assert one.overall.residual.value == pytest.approx(0.75)


def test_the_base_may_draft_itself(tmp_path: Path) -> None:
    """2.5 tokens a step against 1.5: the ratio is relative to the base."""
    old = {f"a{i}": Row("a", [[1, 2] * 4]) for i in range(3)}
    new = {f"a{i}": Row("a", [[1, 2, 3, 4] * 2]) for i in range(3)}
    base, arm = run_of(tmp_path / "b", 1, old), run_of(tmp_path / "s", 3, new)
    one = only(compare(arm_of(base), [arm_of(arm)]))
    assert one.overall.al_base.value == pytest.approx(1.5)
    assert one.overall.al_ratio.value == pytest.approx(2.5 / 1.5)
    assert one.overall.user_tps.value == pytest.approx(20 / 12)


# --- a twin ---------------------------------------------------------------------------------------


def welch(variances: Sequence[float], degrees: Sequence[float]) -> float:
    total = sum(variances)
    known = sum(v * v / (f + 2) for v, f in zip(variances, degrees, strict=True))
    return min(max(total**2 / known - 2, min(degrees)), sum(degrees))


@dataclass(frozen=True)
class Part:
    """Mean of one category, its squared standard error, and the degrees of freedom."""

    mean: float
    variance: float
    degrees: float

    @property
    def interval(self) -> tuple[float, float]:
        half = float(t.ppf(0.975, self.degrees)) * math.sqrt(self.variance)
        return self.mean - half, self.mean + half


def part(values: Sequence[float], sizes: Sequence[float] | None = None) -> Part:
    n = len(values)
    effective = sum(sizes) ** 2 / sum(s * s for s in sizes) if sizes else n
    return Part(statistics.mean(values), statistics.variance(values) / n, max(effective - 1, 1))


def overall(parts: Sequence[Part]) -> Part:
    shares = [p.variance / len(parts) ** 2 for p in parts]
    degrees = welch(shares, [p.degrees for p in parts])
    return Part(statistics.mean(p.mean for p in parts), sum(shares), degrees)


def censored(turns: Sequence[Sequence[int]], k: int) -> list[tuple[int, bool]]:
    """(length, cut) of the decode steps of a conversation; the last of a turn may be cut."""
    return [
        (n, i == len(decode) - 1 and n < k + 1) for decode in turns for i, n in enumerate(decode)
    ]


def log_al(conversations: Sequence[list[tuple[int, bool]]], k: int) -> float:
    found = twin([step for steps in conversations for step in steps], k)[1]
    assert found is not None
    return math.log(found)


def jackknife(conversations: Sequence[list[tuple[int, bool]]], k: int) -> list[float]:
    """Pseudo-values, each of which leaves one conversation out."""
    n = len(conversations)
    whole = log_al(conversations, k)
    left = [log_al([*conversations[:i], *conversations[i + 1 :]], k) for i in range(n)]
    return [whole - (n - 1) * (value - statistics.mean(left)) for value in left]


@dataclass
class World:
    """Two arms, drawn at random: `repeats` runs of each; times differ by run, steps by arm only."""

    k: tuple[int, int]
    rows: tuple[list[dict[str, Row]], list[dict[str, Row]]] = field(
        default_factory=lambda: ([], [])
    )


def world(seed: int, k: tuple[int, int], n_repeats: int) -> World:
    rng = random.Random(seed)
    made = World(k)
    sizes = {"a": 5, "b": 3, "c": 4}
    names = [(c, f"{c}{i}", rng.randint(1, 3)) for c, n in sizes.items() for i in range(n)]
    for which, drafted in enumerate(k):
        steps = {
            name: [
                [*(rng.randint(1, drafted + 1) for _ in range(rng.randint(12, 20)))]
                for _ in range(n_turns)
            ]
            for _, name, n_turns in names
        }
        for _ in range(n_repeats):
            made.rows[which].append(
                {
                    name: Row(
                        c, steps[name], rng.randint(5, 15) * MS, ttft_ns=rng.randint(20, 90) * MS
                    )
                    for c, name, _ in names
                }
            )
    return made


@pytest.mark.parametrize(
    ("seed", "k", "n_repeats"), [(1, (0, 3), 1), (2, (3, 2), 1), (3, (0, 3), 3), (4, (2, 3), 2)]
)
def test_every_figure_equals_its_twin(
    tmp_path: Path, seed: int, k: tuple[int, int], n_repeats: int
) -> None:
    made = world(seed, k, n_repeats)
    arms = [
        arm_of(*(run_of(tmp_path / f"{w}{i}", k[w], r) for i, r in enumerate(made.rows[w])))
        for w in (0, 1)
    ]
    found = rows_of(only(compare(arms[0], arms[1:])))
    parts: dict[str, list[Part]] = {
        "user_tps": [],
        "step_time": [],
        "ttft": [],
        "al_ratio": [],
        "predicted": [],
    }
    for c in "abc":
        names = [name for name in made.rows[0][0] if name[0] == c]
        tps, step, ttft, pseudo, log, sizes = [], [], [], [], [], []
        for w in (0, 1):
            steps = [made.rows[w][0][name].turns for name in names]
            tokens = [sum(map(sum, turns)) for turns in steps]
            n_steps = [sum(map(len, turns)) for turns in steps]
            times = [
                [made.rows[w][r][name].step_ns / 1e9 for r in range(n_repeats)] for name in names
            ]
            tps.append(
                [
                    statistics.mean(math.log(n / (m * s)) for s in each)
                    for n, m, each in zip(tokens, n_steps, times, strict=True)
                ]
            )
            step.append([statistics.mean(map(math.log, each)) for each in times])
            ttft.append(
                [
                    statistics.mean(
                        math.log(made.rows[w][r][name].ttft_ns / 1e9 * (i + 1))
                        for r in range(n_repeats)
                        for i in range(len(turns))
                    )
                    for name, turns in zip(names, steps, strict=True)
                ]
            )
            pooled = [censored(turns, k[w]) * n_repeats for turns in steps]
            pseudo.append(jackknife(pooled, k[w]))
            log.append(log_al(pooled, k[w]))
            sizes.append([m * n_repeats for m in n_steps])
        both = [a + b for a, b in zip(*sizes, strict=True)]

        def minus(values: Sequence[Sequence[float]]) -> list[float]:
            return [b - a for a, b in zip(values[0], values[1], strict=True)]

        al, cost = minus(pseudo), minus(step)
        ratio = part(al, both)
        assert ratio.mean == pytest.approx(log[1] - log[0])
        parts["user_tps"].append(part(minus(tps)))
        parts["step_time"].append(part(cost))
        parts["ttft"].append(part(minus(ttft)))
        parts["al_ratio"].append(ratio)
        parts["predicted"].append(part([a - s for a, s in zip(al, cost, strict=True)], both))
        assert found[c].al.value == pytest.approx(math.exp(log[1]))
        assert found[c].al_base.value == pytest.approx(math.exp(log[0]))
    for name, by_category in parts.items():
        for c, expected in zip("abc", by_category, strict=True):
            same(getattr(found[c], name), expected)
        same(getattr(found["Overall"], name), overall(by_category))
    total = found["Overall"]
    assert total.residual.value == pytest.approx(total.user_tps.value / total.predicted.value)


def same(figure: Figure, expected: Part) -> None:
    low, high = expected.interval
    assert figure.value == pytest.approx(math.exp(expected.mean))
    assert figure.interval == pytest.approx((math.exp(low), math.exp(high)))


# --- properties -----------------------------------------------------------------------------------


def manifest(fingerprint: str = "f", k: int = 3) -> dict[str, Any]:
    return {
        "config": {},
        "engine": {"draft_length": k},
        "environment": {},
        "prompts": {"fingerprint": fingerprint},
        "dataset": {},
        "sessions": [],
    }


def measured(
    tps: Sequence[float], steps: Sequence[int], categories: Sequence[str], scale: float = 1.0
) -> Measured:
    """Conversations of so many uncut steps of 1, 2, 3, 1, ... tokens, at so many tokens/s."""
    lengths = np.zeros((len(tps), 10), np.int64)
    for i, n in enumerate(steps):
        for step in range(n):
            lengths[i, 1 + step % 3] += 1
    shown = lengths[:, :5] @ np.arange(5)
    log_tps = np.log(np.array(tps) / scale)
    names = [f"{c}{i}" for i, c in enumerate(categories)]
    return Measured(
        {name: i for i, name in enumerate(names)},
        frozenset(),
        tuple(categories),
        log_tps,
        np.log(shown / np.array(steps)) - log_tps,
        -log_tps,
        np.full((len(tps), 3), np.nan),
        lengths,
        dict.fromkeys(names, ((0, "00"),)),
    )


def sampled(*runs: Measured, fingerprint: str = "f", tps: Sequence[Figure] = ()) -> Sample:
    """An arm, without any store."""
    none = Figure(None, why_not="not told")
    figures = [*tps, *([none] * (len(runs) - len(tps)))]
    made = tuple(
        SampleRun(f"run {i}", (), tuple(sorted(set(run.category))), (), figure, run, {})
        for i, (run, figure) in enumerate(zip(runs, figures, strict=True))
    )
    return Sample("arm", manifest(fingerprint), made)


rates = st.lists(st.floats(5, 500), min_size=6, max_size=6)
counts = st.lists(st.integers(5, 60), min_size=6, max_size=6)


@given(rates, rates, counts, counts)
def test_swapped_arms_give_the_inverse(
    mine: list[float], theirs: list[float], n_mine: list[int], n_theirs: list[int]
) -> None:
    base, arm = (
        sampled(measured(tps, n, "aaabbb")) for tps, n in ((mine, n_mine), (theirs, n_theirs))
    )
    there, back = only(compare(base, [arm])), only(compare(arm, [base]))
    for row, inverse in zip(rows_of(there).values(), rows_of(back).values(), strict=True):
        for name in ("al_ratio", "user_tps", "step_time", "predicted", "residual"):
            one, other = getattr(row, name), getattr(inverse, name)
            assert one.value * other.value == pytest.approx(1)
            assert one.interval[0] * other.interval[1] == pytest.approx(1)
        assert row.al == inverse.al_base


@given(rates, rates, counts, st.floats(0.1, 10))
def test_an_arm_that_takes_longer_is_slower_by_that(
    mine: list[float], theirs: list[float], n: list[int], longer: float
) -> None:
    base = sampled(measured(mine, n, "aaabbb"))
    one, other = (
        only(compare(base, [sampled(measured(theirs, n, "aaabbb", scale))]))
        for scale in (1.0, longer)
    )
    for row, slower in zip(rows_of(one).values(), rows_of(other).values(), strict=True):
        assert slower.user_tps.value == pytest.approx(row.user_tps.value / longer)
        assert slower.step_time.value == pytest.approx(row.step_time.value * longer)
        assert slower.al_ratio == row.al_ratio
        assert slower.user_tps.interval[1] / slower.user_tps.interval[0] == pytest.approx(
            row.user_tps.interval[1] / row.user_tps.interval[0]
        )


# --- which conversations --------------------------------------------------------------------------


def test_every_conversation_that_is_left_out_has_one_reason(tmp_path: Path) -> None:
    def rows(k: int, *, without: str, failed: str, prompt: str) -> dict[str, Row]:
        found = uniform(k, n=8, names="a")
        found["a4"] = replace(found["a4"], prompt=prompt)
        found["a5"] = replace(found["a5"], turns=[[]])  # one token in all
        found[failed] = replace(found[failed], failed=True)
        return {name: row for name, row in found.items() if name != without}

    base = arm_of(
        run_of(tmp_path / "b0", 0, rows(0, without="a0", failed="a1", prompt="aa")),
        run_of(tmp_path / "b1", 0, rows(0, without="a2", failed="a1", prompt="aa")),
    )
    arm = arm_of(
        run_of(tmp_path / "s0", 3, rows(3, without="a3", failed="a1", prompt="aa")),
        run_of(tmp_path / "s1", 3, rows(3, without="a3", failed="a1", prompt="bb")),
    )
    one = only(compare(base, [arm]))
    assert one.n_left_out == {
        "asked with other prompts": 1,  # a4
        "failed in both arms": 1,  # a1
        "measured in the base only": 1,  # a3
        "not measured in every repeat": 2,  # a0, a2
        "without a token after the first": 1,  # a5
    }
    assert one.overall.n_pairs == 2  # a6, a7
    told = [c.sentence for c in one.checks if "in no ratio" in c.sentence]
    assert len(told) == 5
    assert any("--history frozen" in sentence for sentence in told)
    assert not any("token by token" in c.sentence for c in one.checks)


def test_a_single_pair_gives_no_interval_and_none_gives_nothing(tmp_path: Path) -> None:
    base = {"a0": Row("a", [[1] * 9]), "b0": Row("b", [[1] * 9]), "b1": Row("b", [[1] * 9])}
    arm = {name: replace(row, step_ns=5 * MS) for name, row in base.items()}
    expected = {"a": 1, "b": 2, "c": 2}
    one = only(
        compare(
            arm_of(run_of(tmp_path / "b", 0, base, expected=expected)),
            [arm_of(run_of(tmp_path / "s", 0, arm, expected=expected))],
        )
    )
    found = rows_of(one)
    assert found["a"].user_tps.value == pytest.approx(2)
    assert found["a"].user_tps.interval is None
    assert found["a"].user_tps.why_not == "an interval needs two conversations in a category"
    assert found["b"].user_tps.interval is not None
    assert found["c"].user_tps == Figure(None, None, "no conversation was measured in both arms")
    assert found["Overall"].user_tps.value == pytest.approx(2)
    assert found["Overall"].user_tps.interval is None
    assert found["Overall"].user_tps.why_not.startswith("category a: an interval needs two")
    assert one.detectable.value is None
    assert any(c.sentence.startswith("c: no pair") for c in one.checks)
    nothing = only(
        compare(
            arm_of(run_of(tmp_path / "b2", 0, {"a0": base["a0"]})),
            [arm_of(run_of(tmp_path / "s2", 0, {"a1": base["a0"]}))],
        )
    )
    assert nothing.overall.user_tps.value is None
    assert nothing.between.total.value is None
    assert nothing.n_left_out == {"measured in the arm only": 1, "measured in the base only": 1}


def test_conversations_of_uncounted_steps_are_in_no_step_time(tmp_path: Path) -> None:
    """a0 may merge steps (0: cannot say); an event of two steps, told so, is two steps."""
    base = uniform(0, n=4, names="a")
    merged = Row("a", [[1, 2, 3, 4] * 2], engine_steps=[0, *[1] * 7])
    told = Row("a", [[1, 2, 3, 4] * 2], engine_steps=[2, *[1] * 7])
    arm = {**uniform(3, n=4, names="a", step_ns=10 * MS), "a0": merged, "a1": told}
    one = only(
        compare(arm_of(run_of(tmp_path / "b", 0, base)), [arm_of(run_of(tmp_path / "s", 3, arm))])
    )
    assert one.overall.user_tps.value == pytest.approx(200 / 80)
    assert one.overall.step_time.value == pytest.approx((80 / 9 / 10) ** (1 / 3))
    assert one.overall.predicted.value is not None
    assert one.overall.predicted.interval is None
    assert "merge engine steps" in one.overall.predicted.why_not
    assert any(
        c.sentence.startswith("1 conversation(s) have events that merge") for c in one.checks
    )


# --- repeats --------------------------------------------------------------------------------------


def test_repeats_are_averaged_and_their_spread_is_told_apart() -> None:
    """Three rounds, in which every conversation is 1.1, 1.2 and 1.5 times as fast: all the spread
    is that of runs."""
    base = [measured([100.0] * 4, [9] * 4, "aabb")] * 3
    arm = [measured([100.0 * f] * 4, [9] * 4, "aabb") for f in (1.1, 1.2, 1.5)]
    one = only(compare(sampled(*base), [sampled(*arm)]))
    logs = [math.log(f) for f in (1.1, 1.2, 1.5)]
    mean, sd = statistics.mean(logs), statistics.stdev(logs)
    assert one.overall.user_tps.value == pytest.approx(math.exp(mean))
    assert one.overall.user_tps.interval == pytest.approx((math.exp(mean), math.exp(mean)))
    assert one.between.by_round == pytest.approx((1.1, 1.2, 1.5))
    assert one.between.sd.value == pytest.approx(sd)
    assert one.between.sd.interval == pytest.approx(
        [sd * math.sqrt(2 / chi2.ppf(q, 2)) for q in (0.975, 0.025)]
    )
    # Their TTFT was made the inverse.
    assert one.between_ttft.by_round == pytest.approx((1 / 1.1, 1 / 1.2, 1 / 1.5))
    assert one.between_ttft.sd.value == pytest.approx(sd)
    assert one.overall.ttft.value == pytest.approx(math.exp(-mean))
    half = float(t.ppf(0.975, 2)) * sd / math.sqrt(3)
    assert one.between.total.value == pytest.approx(math.exp(mean))
    assert one.between.total.interval == pytest.approx(
        (math.exp(mean - half), math.exp(mean + half))
    )


def test_noise_of_each_conversation_is_not_counted_twice() -> None:
    """Rounds that differ by what each conversation does by itself: analysis of variance by hand.

    Two rounds of two conversations, log ratios (0, 2) and (1, 1): conversation means 0.5 and 1.5,
    round means 1 and 1. What is left is +-0.5: 4 x 0.25 / ((2 - 1) (2 - 1)) = 1 is the variance of
    one, half of that of a round's mean. The rounds' own variance, 0, is none.
    """
    ratios = [[0.0, 2.0], [1.0, 1.0]]
    base = [measured([1.0, 1.0], [9, 9], "aa")] * 2
    arm = [measured([math.exp(x) for x in row], [9, 9], "aa") for row in ratios]
    one = only(compare(sampled(*base), [sampled(*arm)]))
    assert one.between.by_round == pytest.approx((math.e, math.e))
    assert one.between.total.interval == pytest.approx(one.overall.user_tps.interval)
    # log ratios (0, 1) and (3, 2): conversation means 1.5, 1.5; rounds 0.5 and 2.5, of sd sqrt 2;
    # left +-0.5, so that 0.5 of the variance 2 between rounds is the conversations' own.
    arm = [measured([math.exp(x) for x in row], [9, 9], "aa") for row in ((0.0, 1.0), (3.0, 2.0))]
    one = only(compare(sampled(*base), [sampled(*arm)]))
    half = float(t.ppf(0.975, 1)) * math.sqrt((2 - 0.5) / 2)
    assert one.overall.user_tps.interval == pytest.approx((math.exp(1.5), math.exp(1.5)))
    assert one.between.total.interval == pytest.approx((math.exp(1.5 - half), math.exp(1.5 + half)))


def test_the_squares_of_the_two_half_widths_add() -> None:
    base = [measured([1.0] * 3, [9] * 3, "aaa")] * 2
    arm = [measured([math.exp(x + r) for x in (0, 1, 2)], [9] * 3, "aaa") for r in (0.0, 0.5)]
    one = only(compare(sampled(*base), [sampled(*arm)]))
    conversations = float(t.ppf(0.975, 2)) / math.sqrt(3)
    runs = float(t.ppf(0.975, 1)) * 0.5 / math.sqrt(2) / math.sqrt(2)
    half = math.hypot(conversations, runs)
    assert one.between.total.interval == pytest.approx(
        (math.exp(1.25 - half), math.exp(1.25 + half))
    )


def test_rounds_pair_the_repeats_that_there_are() -> None:
    """Two repeats of the base, three of the arm: two rounds, and means over all."""
    base = [measured([100.0] * 2, [9] * 2, "aa")] * 2
    arm = [measured([100.0 * f] * 2, [9] * 2, "aa") for f in (2, 2, 16)]
    one = only(compare(sampled(*base), [sampled(*arm)]))
    assert one.overall.user_tps.value == pytest.approx(4)
    assert one.between.by_round == pytest.approx((2, 2))
    assert any("the base has 2 repeat(s) and the arm 3" in c.sentence for c in one.checks)


def test_one_round_says_that_the_next_is_not_known() -> None:
    run = measured([100.0] * 2, [9] * 2, "aa")
    one = only(compare(sampled(run), [sampled(run)]))
    assert one.between.n_rounds == 1
    assert one.between.by_round == (1.0,)
    assert one.between.sd.value is None
    assert one.between.total.value == 1.0
    assert one.between.total.interval is None
    assert "--repeat" in one.between.total.why_not


def test_output_tps_has_an_interval_from_three_rounds_and_none_from_one() -> None:
    run = measured([100.0] * 2, [9] * 2, "aa")
    base = sampled(run, run, run, tps=[Figure(100.0)] * 3)
    arm = sampled(run, run, run, tps=[Figure(v) for v in (110.0, 120.0, 150.0)])
    logs = [math.log(f) for f in (1.1, 1.2, 1.5)]
    mean, half = statistics.mean(logs), t.ppf(0.975, 2) * statistics.stdev(logs) / math.sqrt(3)
    found = only(compare(base, [arm])).output_tps
    assert found.value == pytest.approx(math.exp(mean))
    assert found.interval == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    alone = only(
        compare(sampled(run, tps=[Figure(100.0)]), [sampled(run, tps=[Figure(150.0)])])
    ).output_tps
    assert alone.value == pytest.approx(1.5)
    assert alone.interval is None
    assert alone.why_not.startswith("one throughput of each run")
    none = only(compare(base, [sampled(run, run, run)])).output_tps
    assert none == Figure(None, None, "arm: not told")


# --- unpaired -------------------------------------------------------------------------------------


def test_other_prompts_are_compared_without_pairs() -> None:
    """Two independent samples: the standard errors add; ids that are alike mean nothing."""
    mine, theirs = [100.0, 110.0, 130.0], [200.0, 260.0, 300.0, 310.0]
    base = sampled(measured(mine, [9] * 3, "aaa"), fingerprint="random")
    arm = sampled(measured(theirs, [9] * 4, "aaaa"))
    with pytest.raises(UserError, match=r"fingerprint of the prompts .* --allow prompts"):
        compare(base, [arm])
    one = only(compare(base, [arm], allow=["prompts"]))
    assert not one.paired
    first, second = (part([math.log(v) for v in values]) for values in (mine, theirs))
    expected = Part(
        second.mean - first.mean,
        first.variance + second.variance,
        welch([first.variance, second.variance], [2, 3]),
    )
    same(one.overall.user_tps, expected)
    same(one.by_category[0].user_tps, expected)
    assert (one.overall.n_pairs, one.overall.n_base, one.overall.n) == (0, 3, 4)
    assert any("different prompts" in c.sentence for c in one.checks)


def test_a_category_of_one_arm_only_has_no_ratio_but_counts_in_its_arm() -> None:
    base = sampled(measured([100.0, 100.0], [9] * 2, ["random"] * 2), fingerprint="r")
    arm = sampled(measured([200.0, 200.0, 800.0, 800.0], [9] * 4, "aabb"))
    one = only(compare(base, [arm], allow=["prompts"]))
    assert {row.user_tps.value for row in one.by_category} == {None}
    assert one.overall.user_tps.value == pytest.approx(4)  # geometric mean of 2 and 8
    assert any("in one arm only" in c.sentence for c in one.checks)


# --- refusals -------------------------------------------------------------------------------------


def changed(run: Run, section: str, values: Mapping[str, Any]) -> Run:
    found = store.read_manifest(run.directory)
    found[section].update(values)
    store.write_manifest(run.directory, found)
    return store.load(run.directory)


REFUSED = [
    (
        "prompts",
        "prompts",
        {"fingerprint": "e" * 64},
        "the fingerprint of the prompts is ffffffffffff",
    ),
    ("config", "output_length", {"output_length": 64}, "output_length is 4096 in the base and 64"),
    ("config", "temperature", {"temperature": 0.7}, "temperature is 0.0 in the base and 0.7 in"),
    ("config", "top_p", {"top_p": 0.9}, "top_p is 1.0"),
    ("config", "top_k", {"top_k": 5}, "top_k is 0"),
    ("config", "ignore_eos", {"ignore_eos": True}, "ignore_eos is False"),
    ("config", "sampling_kwargs", {"sampling_kwargs": {"min_p": 0.1}}, "sampling_kwargs is {}"),
    ("config", "seed", {"seed": 7}, "seed is 0"),
    ("config", "order", {"order": "dataset"}, "order is shuffle"),
    ("config", "concurrency", {"concurrency": 3}, "concurrency is 2 in the base and 3"),
    ("config", "tp_size", {"tp_size": 2}, "tp_size is 1"),
    ("config", "max_seq_len", {"max_seq_len": 2048}, "max_seq_len is None"),
    ("config", "engine.block", {"engine_args": {"block": 8}}, "engine.block is the default"),
    ("config", "target", {"model_dir": "/models/other"}, "the target checkpoint is aa in"),
    ("engine", "engine", {"name": "SGLANG"}, "the engine is VLLM in the base and SGLANG"),
    ("engine", "engine.version", {"version": "0.33.0"}, "engine.version is 0.32.0"),
    ("engine", "engine.max_num_seqs", {"max_num_seqs": 192}, "engine.max_num_seqs is 64"),
    ("engine", "engine.prefix_cache", {"prefix_cache": True}, "engine.prefix_cache is False"),
    ("engine", "engine.simulated", {"simulated": True}, "engine.simulated is False"),
    ("engine", "engine.dtype", {"settings": {"dtype": "float16"}}, "engine.dtype is bfloat16"),
    ("environment", "gpus", {"gpus": [{"name": "NVIDIA A100"}]}, "the list of GPUs is ['NVIDIA H"),
    ("environment", "cpu", {"cpu": "Another CPU"}, "the CPU is Some CPU"),
]


@pytest.mark.parametrize(("section", "name", "values", "words"), REFUSED)
def test_a_difference_is_refused_by_its_name_unless_it_is_meant(
    tmp_path: Path, section: str, name: str, values: dict[str, Any], words: str
) -> None:
    base = run_of(tmp_path / "b", 0, uniform(0, names="a"))
    arm = changed(run_of(tmp_path / "s", 3, uniform(3, names="a")), section, values)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        compare(arm_of(base), [arm_of(arm, label="EAGLE3 K=3")])
    sentence = str(refused.value)
    assert sentence.endswith(f"--allow {name}")
    assert ". " not in sentence
    assert "'EAGLE3 K=3'" in sentence
    one = only(compare(arm_of(base), [arm_of(arm)], allow=[name]))
    assert any(f"(--allow {name})" in c.sentence for c in one.checks if c.level == "warning")
    assert one.overall.user_tps.value == pytest.approx(2.5)


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    base = run_of(tmp_path / "b", 0, uniform(0))
    arm = changed(
        run_of(tmp_path / "s", 3, uniform(3)), "config", {"concurrency": 9, "temperature": 1.0}
    )
    with pytest.raises(UserError, match=r"--allow concurrency --allow temperature$"):
        compare(arm_of(base), [arm_of(arm)])
    with pytest.raises(UserError, match=r"--allow temperature$"):
        compare(arm_of(base), [arm_of(arm)], allow=["concurrency"])


def test_another_engine_may_have_other_settings(tmp_path: Path) -> None:
    base = run_of(tmp_path / "b", 0, uniform(0))
    other = {"name": "SGLANG", "version": "0.5.23", "settings": {"dtype": "float16"}}
    arm = run_of(tmp_path / "s", 3, uniform(3), engine=other)
    compare(arm_of(base), [arm_of(arm)], allow=["engine"])


def test_what_speculation_changes_is_never_refused(tmp_path: Path) -> None:
    base = run_of(
        tmp_path / "b",
        0,
        uniform(0),
        engine={"max_seq_len": 4094, "settings": {"async_scheduling": True}},
    )
    arm = run_of(
        tmp_path / "s",
        3,
        uniform(3),
        engine={
            "max_seq_len": 4092,
            "settings": {
                "async_scheduling": False, "speculative_method": "eagle3",
                "draft_sample_method": "greedy", "kv_cache_memory_bytes": 5,
            },
        },
        config={
            "engine_args": {"speculative_config": {"x": 1}, "speculative_attention_mode": "decode"},
            "draft_sample_method": "greedy",
        },
    )  # fmt: skip
    one = only(compare(arm_of(base), [arm_of(arm)]))
    told = [c for c in one.checks if "async_scheduling" in c.sentence]
    assert [c.level for c in told] == ["note"]
    assert "True in the base and False in the arm" in told[0].sentence
    asked = changed(arm, "config", {"engine_args": {"async_scheduling": False}})
    with pytest.raises(UserError, match=r"--allow engine\.async_scheduling$"):
        compare(arm_of(base), [arm_of(asked)])


def test_lesser_differences_are_warned_of(tmp_path: Path) -> None:
    base = run_of(tmp_path / "b", 0, uniform(0))
    arm = changed(run_of(tmp_path / "s", 3, uniform(3)), "config", {"warmup": 7})
    arm = changed(arm, "environment", {"packages": {"vllm": "0.32.0", "numpy": "2.0.0"}})
    gpus = [{"name": "NVIDIA H100", "driver_version": "999"}]
    arm = changed(arm, "environment", {"gpus": gpus})
    one = only(compare(arm_of(base), [arm_of(arm)]))
    told = [
        c.sentence.split("speculation: ")[1] for c in one.checks if "more than spec" in c.sentence
    ]
    assert told == [
        "--warmup is None in the base and 7 in the arm",
        "the package numpy is 2.3.5 in the base and 2.0.0 in the arm",
        "the GPU driver is ['570.1'] in the base and ['999'] in the arm",
    ]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    run = run_of(tmp_path / "b", 0, uniform(0))
    with pytest.raises(UserError, match="--allow names 'colour'") as refused:
        compare(arm_of(run), [arm_of(run)], allow=["colour"])
    for name in (
        "concurrency",
        "prompts",
        "engine.version",
        "engine.dtype",
        "gpus",
        "output_length",
    ):
        assert f" {name}" in str(refused.value)
    with pytest.raises(UserError, match="no arm beside the base"):
        compare(arm_of(run), [])


def test_checks_of_the_runs_themselves_come_along(tmp_path: Path) -> None:
    base = run_of(tmp_path / "b", 0, uniform(0), engine={"simulated": True})
    arm = run_of(tmp_path / "s", 3, uniform(3), engine={"simulated": True})
    found = compare(arm_of(base, base), [arm_of(arm)])
    for checks in (found.checks, only(found).checks):
        assert [c.level for c in checks if "SIMULATED" in c.sentence] == ["error"]


def test_a_stored_arm_and_its_sample_compare_alike(tmp_path: Path) -> None:
    base, arm = (arm_of(run_of(tmp_path / str(k), k, uniform(k))) for k in (0, 3))
    there = only(compare(base, [arm]))
    again = only(compare(sample.of_arm(base), [sample.of_arm(arm)]))
    assert again.by_category == there.by_category


# --- end to end -----------------------------------------------------------------------------------


def test_null_engine_arms_in_abba_order(tmp_path: Path) -> None:
    """The drafter is right 7 times in 10, its steps take 1.2 times as long: the step-time ratio is
    exactly that, the prediction AL / 1.2, and times say the same twice."""
    from speedbench.cli import main

    model = tmp_path / "model"
    assert main(["calibrate", "--build_only", "--save_dir", str(model)]) == 0
    target = next(path.parent for path in sorted(model.rglob("tokenizer.json")))
    slower = tmp_path / "slower.yaml"
    slower.write_text("engine_args: {step_ms: 12.0}\n")
    runs: list[Path] = []
    for i, which in enumerate("ABBA"):
        argv = ["run", "--engine", "NULL", "--model_dir", str(target), "--dataset", "mini"]
        argv += ["--num_requests", "44", "--concurrency", "2", "--output_length", "200"]
        argv += ["--save_dir", str(tmp_path / "runs" / f"{i}-{which}")]
        if which == "B":
            argv += ["--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", str(target)]
            argv += ["--runtime_params", str(slower)]
        assert main(argv) == 0
        runs.append(tmp_path / "runs" / f"{i}-{which}")
    base, arm = load_arms([tmp_path / "runs"])
    assert [run.directory for run in base.runs] == [runs[0], runs[3]]
    assert [run.directory for run in arm.runs] == [runs[1], runs[2]]
    with pytest.raises(UserError, match=r"engine\.step_ms is 10\.0 in the base and 12\.0"):
        compare(base, [arm])
    one = only(compare(base, [arm], allow=["engine.step_ms"]))
    assert one.overall.step_time.value == pytest.approx(1.2)
    assert one.overall.al.value == pytest.approx(sum(0.7**k for k in range(4)), rel=0.03)
    assert one.overall.predicted.value == pytest.approx((one.overall.al_ratio.value or 0) / 1.2)
    assert one.overall.residual.value == pytest.approx(1, abs=0.02)
    assert len(set(one.between.by_round)) == 1


# --- the page -------------------------------------------------------------------------------------


def drawn(comparison: Comparison, width: int) -> str:
    file = io.StringIO()
    console.draw(of_comparison(comparison), Console(file=file, width=width, color_system=None))
    return file.getvalue()


@pytest.fixture
def several(tmp_path: Path) -> Comparison:
    """A baseline against three arms, of which one is as fast as it is."""
    base = arm_of(run_of(tmp_path / "b", 0, uniform(0)), label="baseline")
    arms = []
    for k, ms in ((3, 15), (2, 30)):
        rows = uniform(3, step_ns=ms * MS)
        arms.append(arm_of(run_of(tmp_path / f"s{k}", 3, rows), label=f"EAGLE3 K={k}"))
    same_speed = {
        name: replace(row, step_ns=(8 if int(name[1]) % 2 else 12) * MS)
        for name, row in uniform(0).items()
    }
    arms.append(arm_of(run_of(tmp_path / "n", 0, same_speed), label="baseline again"))
    return compare(base, arms)


def test_a_terminal_of_80_columns_shows_it_whole(several: Comparison) -> None:
    text = drawn(several, 80)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert re.search(r"a\W+4\W+2\.5000\W+2\.5000-2\.5000\W+1\.6667\W+1\.6667-1\.6667", text)
    assert "1.6667 (95 % 1.6667-1.6667) times the base's. Geometric mean over 8 paired" in flat
    assert "2.500 times the tokens of the base's (AL ratio) and takes 1.500 times as long" in flat
    assert "NOT SIGNIFICANT" in flat
    assert re.search(r"\d\.\d{4} ns", text)
    assert "ns: not significant" in flat
    assert "How much the next run of the same arms would differ is not in them" in flat
    assert "baseline again" in flat


def test_a_base_that_drafts_shows_its_own_length(tmp_path: Path) -> None:
    names = ("summarization", "multilingual")
    base, arm = (
        run_of(tmp_path / str(k), 3, uniform(3, names=names, step_ns=ms * MS))
        for k, ms in ((0, 10), (1, 12))
    )
    found = compare(arm_of(base), [arm_of(arm)])
    text = drawn(found, 80)
    assert max(map(len, text.splitlines())) <= 80
    row = r"summarization\W+4\W+2\.5000\W+2\.5000\W+1\.0000 ns\W+1\.0000-1\.0000\W+0\.8333\W"
    assert re.search(row, text)


def test_repeats_are_told_in_words() -> None:
    base = [measured([100.0] * 4, [9] * 4, "aabb")] * 2
    arm = [measured([100.0 * f] * 4, [9] * 4, "aabb") for f in (1.1, 1.2)]
    flat = " ".join(drawn(compare(sampled(*base), [sampled(*arm)]), 80).split())
    assert "user TPS 1.1000, 1.2000 times the base's in 2 rounds" in flat
    # The logs of the two rounds are 0.0870 apart: their mean has a standard error of half that, and
    # Student's t with one degree of freedom is 12.7062. All conversations are alike.
    low, high = (1.32**0.5 * (1.2 / 1.1) ** (sign * 12.7062 / 2) for sign in (-1, 1))
    assert f"User TPS 1.1489 (95 % {low:.4f}-{high:.4f}) times the base's, NOT SIGNIFICANT" in flat
    assert "of conversations alone it would be 1.1489 (95 % 1.1489-1.1489)" in flat
    assert re.search(rf"Overall\W+4\W.*1\.1489 ns\W+{low:.4f}-{high:.4f}", flat)


def test_figures_have_their_numbers_in_a_table_and_ids_of_their_own(several: Comparison) -> None:
    blocks = list(of_comparison(several))
    charts = [block for block in blocks if isinstance(block, Chart)]
    assert len({chart.id for chart in charts}) == len(charts) == 7
    for chart in charts:
        assert chart.reference == 1.0
        assert chart.horizontal
        for i, series in enumerate(chart.series):
            shown = [row[1 + 2 * i].split()[0] for row in chart.table.rows]
            assert shown == [f"{y:.4f}" for y in series.y]
            bounds = [row[2 + 2 * i] for row in chart.table.rows]
            assert bounds == [
                f"{low:.4f}-{high:.4f}" for low, high in zip(series.low, series.high, strict=True)
            ]
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    assert headings[:2] == ["speedbench: comparison", "Arms"]
    assert "<svg" in html.render(blocks, "comparison")
    written = markdown.write(blocks)
    assert "| baseline again | 1.0000 |" in written


def test_unpaired_arms_are_counted_apart() -> None:
    base = sampled(measured([100.0, 110.0], [9] * 2, "aa"), fingerprint="r")
    arm = sampled(measured([200.0, 210.0, 220.0], [9] * 3, "aaa"))
    blocks = list(of_comparison(compare(base, [arm], allow=["prompts"])))
    tables = [block for block in blocks if isinstance(block, Table)]
    assert tables[0].rows[0][:2] == ("a", "2/3")
    facts = [text for block in blocks if isinstance(block, Facts) for _, text, _ in block.items]
    assert any("2 conversations of the base and 3 of the arm, not paired" in text for text in facts)


# --- embedded and served --------------------------------------------------------------------------


def served_run(directory: Path, ttfts_ms: Sequence[int], step_ns: int, sent_ms: int) -> Run:
    """Single-turn conversations of 8 decode steps, sent so long after they were submitted."""
    records = []
    for i, ttft_ms in enumerate(ttfts_ms):
        made = turn(f"a{i}.0", [1, *[1, 2, 3, 4] * 2], ttft_ns=ttft_ms * MS, step_ns=step_ns)
        told = Served(sent_ns=sent_ms * MS, new_connection=False)
        made = replace(made, steps=[*made.steps[:-1], made.steps[-1]._replace(served=told)])
        records.append(conversation(f"a{i}", "a", made))
    where = {"engine": "OPENAI", "url": "http://127.0.0.1:1", "model": "m"}
    return stored(directory, records, config=where)


def test_where_an_embedded_and_a_served_run_part(tmp_path: Path) -> None:
    """TTFT 50 ms embedded, 80, 90 and 100 ms served, 5 ms of which are the client's; 8 steps of 10
    and of 15 ms."""
    rows = {f"a{i}": Row("a", [[1, 2, 3, 4] * 2]) for i in range(3)}
    base = arm_of(run_of(tmp_path / "embedded", 3, rows))
    arm = arm_of(served_run(tmp_path / "served", (80, 90, 100), 15 * MS, 5))
    one = only(compare(base, [arm]))
    found = {part.part: part for part in one.whereabouts}
    first, later, together = (
        found[name] for name in ("until the first tokens", "after them", "together")
    )
    assert (first.base.value, first.arm.value) == pytest.approx((0.05, 0.09))
    half = float(t.ppf(0.975, 2)) * 0.01 / math.sqrt(3)  # of 30, 40 and 50 ms
    assert first.difference.value == pytest.approx(0.04)
    assert first.difference.interval == pytest.approx((0.04 - half, 0.04 + half))
    assert (later.base.value, later.arm.value) == pytest.approx((0.08, 0.12))
    assert later.difference.interval == pytest.approx((0.04, 0.04))
    assert together.difference.value == pytest.approx(0.08)
    assert one.client.value == pytest.approx(0.005)
    text = " ".join(markdown.write(of_comparison(compare(base, [arm]))).split())
    assert "Where embedded and served part" in text
    assert "from submitting to sending: 0.0050 s (95 % 0.0050-0.0050)" in text


def test_of_chats_only_the_messages_are_known_to_be_the_same(tmp_path: Path) -> None:
    chat = {"engine": "OPENAI", "url": "http://h:1", "model": "m", "endpoint": "chat"}
    base, arm = (
        arm_of(run_of(tmp_path / name, k, uniform(3), config=chat))
        for name, k in (("base", 0), ("arm", 3))
    )
    told = [c.sentence for c in only(compare(base, [arm])).checks if "in both arms" in c.sentence]
    assert told == ["all 8 prompts were the same messages in both arms; the server made the tokens"]


def test_embedded_runs_part_nowhere(tmp_path: Path) -> None:
    base, arm = (arm_of(run_of(tmp_path / name, 3, uniform(3))) for name in "ba")
    one = only(compare(base, [arm]))
    assert one.whereabouts == ()
    assert one.client.value is None
