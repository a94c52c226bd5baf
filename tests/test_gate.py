"""Gates: three outcomes with their borders, what must never pass, and JUnit that CI can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from speedbench.lossless import Losslessness, answer, greedy, sampled
from speedbench.report import junit, sample, sides
from speedbench.report.arms import Arm
from speedbench.report.blocks import Paragraph, Table
from speedbench.report.compare import ArmComparison, BetweenRuns, CategoryComparison
from speedbench.report.gate import (
    Gate,
    GateResult,
    change_in_words,
    evaluate,
    judge,
    overall,
    parse_gate,
)
from speedbench.report.layout_gate import of_gates
from speedbench.report.sample import Sample
from speedbench.report.summary import Figure
from speedbench.types import UserError
from tests.builders import conversation, stored

NONE = Figure(None, why_not="not asked")
USUAL = Figure(1.0, (0.9, 1.1))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    run = stored(tmp_path_factory.mktemp("arm") / "run", [conversation("a", "qa", [1, 2])])
    return sample.of_arm(Arm("EAGLE3 K=3", (run,)))


def compared(
    arm: Sample,
    ratios: Mapping[str, Figure],
    *,
    n_pairs: int = 40,
    categories: Sequence[str] = ("coding", "qa"),
    n_left_out: Mapping[str, int] | None = None,
    paired: bool = True,
) -> ArmComparison:
    """The same ratios overall and in every category: al_ratio, user_tps, step_time, output_tps; and
    `total`, the overall user TPS with the spread of runs, which adds nothing unless it is given."""

    def row(name: str, n: int) -> CategoryComparison:
        return CategoryComparison(
            name=name,
            n_pairs=n if paired else 0,
            n_base=n,
            n=n,
            al_base=Figure(2.0),
            al=Figure(2.0),
            al_ratio=ratios.get("al_ratio", NONE),
            user_tps=ratios.get("user_tps", USUAL),
            step_time=ratios.get("step_time", NONE),
            ttft=ratios.get("ttft", NONE),
            predicted=NONE,
            residual=NONE,
        )

    return ArmComparison(
        arm=arm,
        by_category=tuple(row(name, n_pairs) for name in categories),
        overall=row("overall", n_pairs * len(categories)),
        paired=paired,
        output_tps=ratios.get("output_tps", NONE),
        detectable=NONE,
        between=BetweenRuns(
            2, (1.0, 1.0), NONE, ratios.get("total", ratios.get("user_tps", USUAL))
        ),
        between_ttft=BetweenRuns(
            2, (1.0, 1.0), NONE, ratios.get("total_ttft", ratios.get("ttft", NONE))
        ),
        n_left_out=n_left_out or {},
        checks=(),
    )


def outputs(n: int, n_other: int) -> Losslessness:
    """n requests, of which n_other differ from the baseline, whose two runs are identical."""
    mine = {(f"c{i}", 0): answer("qa", "p", np.array([i, 1], np.int32)) for i in range(n)}
    theirs = {
        key: answer("qa", "p", np.array([i, 2 if i < n_other else 1], np.int32))
        for i, key in enumerate(mine)
    }
    return greedy([mine, mine], [theirs])


def one(
    arm: Sample,
    gate: str,
    ratios: Mapping[str, Figure],
    *,
    lossless: Losslessness | None = None,
    n_expected: Mapping[str, int] | None = None,
    errors: Sequence[str] = (),
    **about: Any,
) -> GateResult:
    (result,) = evaluate(
        [parse_gate(gate)],
        compared(arm, ratios, **about),
        lossless or outputs(40, 0),
        {"coding": 40, "qa": 40} if n_expected is None else n_expected,
        errors,
    )
    return result


# --- what a user writes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("al=-1%", Gate("al", None, "fall", 0.01)),
        ("al[coding]=-3%", Gate("al", "coding", "fall", 0.03)),
        ("al[my group, 2]=-3%", Gate("al", "my group, 2", "fall", 0.03)),
        ("step_time=+5%", Gate("step_time", None, "rise", 0.05)),
        ("speedup=+-2%", Gate("speedup", None, "both", 0.02)),
        ("speedup=\N{PLUS-MINUS SIGN}2.5%", Gate("speedup", None, "both", 0.025)),
        ("al=\N{MINUS SIGN}1%", Gate("al", None, "fall", 0.01)),
        ("output_tps = -0.5 %", Gate("output_tps", None, "fall", 0.005)),
        ("lossless=-1%", Gate("lossless", None, "fall", 0.01)),
        ("lossless=+-10%", Gate("lossless", None, "both", 0.1)),
        ("AL=-1%", Gate("al", None, "fall", 0.01)),
        ("al=-0%", Gate("al", None, "fall", 0.0)),
        ("step_time=+150%", Gate("step_time", None, "rise", 1.5)),
    ],
)
def test_gates_are_read(text: str, gate: Gate) -> None:
    found = parse_gate(text)
    assert (found.metric, found.category, found.side) == (gate.metric, gate.category, gate.side)
    assert found.margin == pytest.approx(gate.margin)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("al", ["al", "METRIC=-N%"]),
        ("al=1%", ["al=1%", "METRIC=-N%"]),
        ("al=-1", ["al=-1", "%"]),
        ("al=-x%", ["al=-x%"]),
        ("acceptance=-1%", ["acceptance", "al"]),
        ("speedups=-1%", ["speedups", "speedup"]),
        ("al=+1%", ["fall without limit", "al=-1%"]),
        ("step_time=-5%", ["rise without limit", "step_time=+5%"]),
        ("lossless=+1%", ["fall without limit", "lossless=-1%"]),
        ("Loseless=-1%", ["loseless", "did you mean lossless?"]),
        ("output_tps[qa]=-1%", ["output_tps", "speedup"]),
        ("al=-100%", ["100"]),
    ],
)
def test_a_mistaken_gate_is_one_sentence(text: str, words: Sequence[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_gate(text)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# --- outcomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "interval", "outcome"),
    [
        ("al=-1%", (0.99, 1.2), "pass"),  # the border itself is allowed
        ("al=-1%", (0.9899, 1.2), "inconclusive"),
        ("al=-1%", (0.95, 0.99), "inconclusive"),  # it may have fallen by exactly 1 %
        ("al=-1%", (0.95, 0.9899), "fail"),
        ("al=-1%", (1.1, 1.2), "pass"),
        ("al=-0%", (1.0, 1.2), "pass"),
        ("al=-0%", (0.999, 1.2), "inconclusive"),
        ("step_time=+5%", (0.5, 1.05), "pass"),
        ("step_time=+5%", (1.0, 1.0501), "inconclusive"),
        ("step_time=+5%", (1.05, 1.2), "inconclusive"),
        ("step_time=+5%", (1.0501, 1.2), "fail"),
        ("speedup=+-1%", (0.99, 1.01), "pass"),
        ("speedup=+-1%", (0.98, 1.01), "inconclusive"),
        ("speedup=+-1%", (0.99, 1.02), "inconclusive"),
        ("speedup=+-1%", (0.5, 2.0), "inconclusive"),
        ("speedup=+-1%", (1.02, 1.03), "fail"),
        ("speedup=+-1%", (0.97, 0.98), "fail"),
        ("speedup=+-1%", (1.01, 1.03), "inconclusive"),
    ],
)
def test_outcomes_and_their_borders(gate: str, interval: tuple[float, float], outcome: str) -> None:
    assert judge(interval, parse_gate(gate)) == outcome


@pytest.mark.parametrize(
    ("gate", "name"),
    [
        ("al=-1%", "al_ratio"),
        ("al[coding]=-1%", "al_ratio"),
        ("speedup=-1%", "user_tps"),
        ("speedup[qa]=-1%", "user_tps"),
        ("output_tps=-1%", "output_tps"),
    ],
)
def test_each_metric_looks_at_its_own_ratio(arm: Sample, gate: str, name: str) -> None:
    for interval, outcome in (
        ((0.995, 1.1), "pass"),
        ((0.9, 1.1), "inconclusive"),
        ((0.9, 0.95), "fail"),
    ):
        found = one(arm, gate, {name: Figure(sum(interval) / 2, interval)})
        assert found.outcome == outcome
        assert found.change.value == pytest.approx(sum(interval) / 2 - 1)
        assert found.change.interval == pytest.approx((interval[0] - 1, interval[1] - 1))


def test_one_round_says_nothing_of_the_next_run(arm: Sample) -> None:
    """The same arm measured twice differs by more than its conversations tell."""
    one_round = {
        "user_tps": Figure(1.5, (1.4, 1.6)),
        "step_time": Figure(0.8, (0.7, 0.9)),
        "al_ratio": Figure(1.1, (1.0, 1.2)),
        "total": Figure(1.5, None, "one round"),
    }
    for gate in ("speedup=-1%", "speedup[qa]=-1%", "step_time=+5%"):
        found = one(arm, gate, one_round)
        assert (found.outcome, found.why) == ("inconclusive", "one round")
        assert found.change.value is not None
    assert one(arm, "al=-1%", one_round).outcome == "pass"  # no clock has a part in it


def within(centre: float, half: float) -> Figure:
    return Figure(centre, (centre * math.exp(-half), centre * math.exp(half)))


def test_times_take_the_spread_of_runs_in(arm: Sample) -> None:
    """exp(+-0.03) over conversations, exp(+-0.05) with runs: runs add 0.04, in squares."""

    ratios = {"user_tps": within(1, 0.03), "total": within(1, 0.05), "step_time": within(1.2, 0.09)}
    for gate, centre, half in (
        ("speedup=-1%", 1.0, 0.05),
        ("speedup[qa]=-1%", 1.0, 0.05),
        ("step_time=+5%", 1.2, (0.09**2 + 0.04**2) ** 0.5),
        ("step_time[qa]=+5%", 1.2, (0.09**2 + 0.04**2) ** 0.5),
    ):
        low, high = one(arm, gate, ratios).change.interval or (0, 0)
        assert (1 + low, 1 + high) == pytest.approx(
            (centre * math.exp(-half), centre * math.exp(half))
        )


@pytest.mark.parametrize(
    ("gate", "interval", "words"),
    [
        ("al=-1%", (1.0, 1.1), "the whole 95 % interval is at or above -1 %"),
        ("al=-1%", (0.8, 0.9), "the whole 95 % interval is below -1 %"),
        ("al=-1%", (0.8, 1.1), "the 95 % interval reaches across -1 %"),
        ("al=+-5%", (0.99, 1.01), "the 95 % interval lies within +-5 %"),
        ("al=+-5%", (0.8, 0.9), "the 95 % interval lies beyond +-5 %"),
        ("al=+-5%", (0.9, 1.0), "the 95 % interval is only partly in +-5 %"),
    ],
)
def test_the_sentence_says_where_the_interval_lies(
    arm: Sample, gate: str, interval: tuple[float, float], words: str
) -> None:
    assert one(arm, gate, {"al_ratio": Figure(sum(interval) / 2, interval)}).why == words


def test_the_sentence_of_what_may_not_rise(arm: Sample) -> None:
    def of(*interval: float) -> str:
        figure = Figure(interval[0], (interval[0], interval[1]))
        return one(arm, "step_time=+5%", {"step_time": figure}).why

    assert of(0.9, 1.0).startswith("the whole 95 % interval is at or below +5 %")
    assert of(1.1, 1.2).startswith("the whole 95 % interval is above +5 %")


def test_ttft_has_a_spread_between_runs_of_its_own(arm: Sample) -> None:
    """That of user TPS, which is none here, says nothing of it."""
    ratios = {"ttft": within(1, 0.03), "total_ttft": within(1, 0.05)}
    assert one(arm, "ttft=+5.1%", {"ttft": within(1, 0.03)}).outcome == "pass"
    (low, high) = one(arm, "ttft=+5.1%", ratios).change.interval or (0, 0)
    assert math.log1p(high) == pytest.approx(0.05)
    assert math.log1p(low) == pytest.approx(-0.05)
    assert one(arm, "ttft=+4%", ratios).outcome == "inconclusive"
    alone = {"ttft": within(1, 0.03), "total_ttft": Figure(1.0, why_not="one round")}
    assert "one round" in one(arm, "ttft=+5%", alone).why


def test_step_time_may_not_rise(arm: Sample) -> None:
    assert one(arm, "step_time=+5%", {"step_time": Figure(1.0, (0.9, 1.04))}).outcome == "pass"
    assert one(arm, "step_time=+5%", {"step_time": Figure(1.1, (1.06, 1.2))}).outcome == "fail"


def test_the_worst_outcome_is_the_command_s() -> None:
    def of(*outcomes: str) -> str:
        gate = parse_gate("al=-1%")
        return overall([GateResult(gate, "arm", o, NONE, "") for o in outcomes])  # type: ignore[arg-type]

    assert of("pass", "pass") == "pass"
    assert of("pass", "inconclusive") == "inconclusive"
    assert of("inconclusive", "fail", "pass") == "fail"


# --- what must not pass ---------------------------------------------------------------------------

GOOD = {"al_ratio": Figure(1.1, (1.05, 1.15)), "user_tps": Figure(1.5, (1.4, 1.6))}


def test_no_interval_is_inconclusive_with_the_reason(arm: Sample) -> None:
    found = one(arm, "al=-1%", {"al_ratio": Figure(1.5, None, "one pair only")})
    assert (found.outcome, found.why) == ("inconclusive", "one pair only")
    found = one(arm, "al=-1%", {"al_ratio": Figure(None, why_not="not one step")})
    assert (found.outcome, found.why) == ("inconclusive", "not one step")


@pytest.mark.parametrize("ratios", [GOOD, {"al_ratio": Figure(0.5, (0.4, 0.6))}])
def test_records_that_cannot_be_right_answer_no_gate(
    arm: Sample, ratios: Mapping[str, Figure]
) -> None:
    found = one(arm, "al=-1%", ratios, errors=["SIMULATED: made up", "and another"])
    assert found.outcome == "inconclusive"
    assert "SIMULATED: made up (and 1 more)" in found.why


def test_missing_conversations_do_not_pass(arm: Sample) -> None:
    expected = {"coding": 42, "qa": 40}
    left_out = {"failed in an arm": 2}
    found = one(arm, "al=-1%", GOOD, n_expected=expected, n_left_out=left_out)
    assert found.outcome == "inconclusive"
    assert "2 of 42 conversations of category coding" in found.why
    assert "2 failed in an arm" in found.why
    assert one(arm, "al[coding]=-1%", GOOD, n_expected=expected).outcome == "inconclusive"
    assert one(arm, "al[qa]=-1%", GOOD, n_expected=expected).outcome == "pass"


def test_one_in_a_hundred_may_be_missing(arm: Sample) -> None:
    assert one(arm, "al=-1%", GOOD, n_pairs=99, n_expected={"qa": 100}).outcome == "pass"
    assert one(arm, "al=-1%", GOOD, n_pairs=98, n_expected={"qa": 100}).outcome == "inconclusive"


def test_a_missing_category_does_not_pass(arm: Sample) -> None:
    found = one(arm, "speedup=-1%", GOOD, n_expected={"coding": 40, "qa": 40, "rag": 40})
    assert found.outcome == "inconclusive"
    assert "40 of 40 conversations of category rag" in found.why
    assert one(arm, "al[rag]=-1%", GOOD, n_expected={"rag": 40}).outcome == "inconclusive"


def test_unpaired_arms_are_counted_by_the_smaller_one(arm: Sample) -> None:
    assert one(arm, "al=-1%", GOOD, paired=False).outcome == "pass"
    found = one(arm, "al=-1%", GOOD, paired=False, n_pairs=30)
    assert found.outcome == "inconclusive"
    assert "10 of 40 conversations" in found.why


def test_a_failure_stays_one_where_conversations_are_missing(arm: Sample) -> None:
    bad = {"al_ratio": Figure(0.5, (0.4, 0.6))}
    assert one(arm, "al=-1%", bad, n_expected={"coding": 80, "qa": 40}).outcome == "fail"


def test_a_category_that_no_arm_has_is_a_mistake(arm: Sample) -> None:
    with pytest.raises(UserError, match=r"codin.*did you mean coding"):
        one(arm, "al[codin]=-1%", GOOD)


def test_times_that_repeat_to_the_last_digit_are_copies(arm: Sample) -> None:
    for gate, name in (("speedup=-1%", "user_tps"), ("step_time=+1%", "step_time")):
        found = one(arm, gate, {name: Figure(1.0, (1.0, 1.0))})
        assert found.outcome == "inconclusive"
        assert "copies" in found.why


def test_acceptance_that_repeats_is_believed_of_enough_conversations(arm: Sample) -> None:
    """Greedy decoding on one engine: not one step differs."""
    same = {"al_ratio": Figure(1.0, (1.0, 1.0))}
    assert one(arm, "al=-1%", same).outcome == "pass"
    few = {"coding": 3, "qa": 3}
    found = one(arm, "al=-1%", same, n_pairs=3, n_expected=few)
    assert found.outcome == "inconclusive"
    assert "all 6 conversations are alike" in found.why


# --- losslessness ---------------------------------------------------------------------------------


def test_lossless_is_held_against_the_floor(arm: Sample) -> None:
    def found(n: int, n_other: int, gate: str = "lossless=-5%") -> GateResult:
        return one(arm, gate, {}, lossless=outputs(n, n_other))

    # Two runs of the baseline are identical: 0 of 400, 60 of 400, 20 of 400 differ.
    assert found(400, 0).outcome == "pass"
    assert found(400, 60).outcome == "fail"
    assert found(400, 20).outcome == "inconclusive"
    assert found(400, 60).change.value == pytest.approx(-0.15)
    assert "points" in change_in_words(found(400, 60))


def test_lossless_is_told_in_points_wherever_it_is_told(arm: Sample) -> None:
    """Shares are apart by points; a fraction of the base's value would be another number."""
    for text, allowed in (("lossless=-5%", "-5 points"), ("lossless=+-10%", "+-10 points")):
        found = one(arm, text, {}, lossless=outputs(2000, 0))
        (table,) = (block for block in of_gates([found]) if isinstance(block, Table))
        assert (found.outcome, found.gate.allowed) == ("pass", allowed)
        assert allowed in found.why
        assert allowed in table.rows[0]
        assert change_in_words(found).startswith("+0.00 points (95 % ")
    assert one(arm, "al=-5%", GOOD).gate.allowed == "-5 %"


def test_two_sided_lossless_needs_a_floor(arm: Sample) -> None:
    """Of 2000 outputs 990 or 10 differ where a baseline run differs from another in none: below
    by 49.5 and 0.5 points. Without another baseline run nothing tells how far a share is above."""
    for n_other, outcome in ((10, "pass"), (990, "fail")):
        found = one(arm, "lossless=+-10%", {}, lossless=outputs(2000, n_other))
        assert found.outcome == outcome
        assert found.change.value == pytest.approx(-n_other / 2000)
    mine = {(f"c{i}", 0): answer("qa", "p", np.array([i], np.int32)) for i in range(2000)}
    alone = greedy([mine], [mine])
    assert one(arm, "lossless=-10%", {}, lossless=alone).outcome == "pass"
    found = one(arm, "lossless=+-10%", {}, lossless=alone)
    assert (found.outcome, found.why) == ("inconclusive", alone.overall.difference.why_not)


def test_few_identical_outputs_are_no_proof_of_losslessness(arm: Sample) -> None:
    assert one(arm, "lossless=-1%", {}, lossless=outputs(20, 0)).outcome == "inconclusive"


def test_without_a_floor_lossless_passes_only_against_the_strictest_one(arm: Sample) -> None:
    mine = {(f"c{i}", 0): answer("qa", "p", np.array([i], np.int32)) for i in range(400)}
    other = {**mine, ("c0", 0): answer("qa", "p", np.array([999], np.int32))}
    assert one(arm, "lossless=-2%", {}, lossless=greedy([mine], [other])).outcome == "pass"
    found = one(arm, "lossless=-1%", {}, lossless=greedy([mine], [other]))
    assert found.outcome == "inconclusive"
    assert "--repeat 2" in found.why


def test_lossless_where_answers_are_missing(arm: Sample) -> None:
    mine = {(f"c{i}", 0): answer("qa", "p", np.array([i], np.int32)) for i in range(400)}
    fewer = dict(list(mine.items())[:380])
    found = one(arm, "lossless=-2%", {}, lossless=greedy([mine], [fewer]))
    assert found.outcome == "inconclusive"
    assert "20 request(s)" in found.why


@pytest.mark.parametrize(
    ("n_left_out", "outcome"),
    [
        ({}, "inconclusive"),
        ({sides.IN_NEITHER: 40}, "inconclusive"),
        ({sides.UNTIMED: 40}, "inconclusive"),
        ({sides.ASKED_OTHERWISE: 40}, "pass"),
        ({sides.NOT_IN_ALL: 40}, "pass"),
    ],
)
def test_lossless_where_neither_side_answered(
    arm: Sample, n_left_out: Mapping[str, int], outcome: str
) -> None:
    """120 conversations were to be answered, 80 pairs are there: what became of the other 40?"""
    about: dict[str, Any] = {"lossless": outputs(400, 0), "n_left_out": n_left_out}
    expected = {"coding": 80, "qa": 40}
    for gate in ("lossless=-2%", "lossless[qa]=-2%"):
        found = one(arm, gate, {}, n_expected=expected, **about)
        assert found.outcome == ("pass" if "qa" in gate else outcome)
    if outcome != "pass":
        found = one(arm, "lossless=-2%", {}, n_expected=expected, **about)
        assert found.why.startswith("40 of 120 conversations were answered on neither side")


def test_lossless_cannot_be_gated_at_temperature(arm: Sample) -> None:
    mine = {(f"c{i}", 0): answer("qa", "p", np.array([i], np.int32)) for i in range(40)}
    found = one(arm, "lossless=-1%", {}, lossless=sampled([mine, mine], [mine]))
    assert found.outcome == "inconclusive"
    assert "temperature" in found.why


# --- forms ----------------------------------------------------------------------------------------

CHILDREN: Mapping[str, set[str]] = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "property": set(),
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
    "failure": set(),
    "skipped": set(),
    "system-out": set(),
}
ATTRIBUTES: Mapping[str, tuple[set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"skipped", "time", "timestamp", "hostname", "id", "package", "file"},
    ),
    "properties": (set(), set()),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name"}, {"classname", "time", "group"}),
    "failure": (set(), {"message", "type"}),
    "skipped": (set(), {"message", "type"}),
    "system-out": (set(), set()),
}
"""What the schema of Jenkins' xUnit plugin (junit-10.xsd) lets an element hold; of attributes,
those it must have and those it may."""


def assert_valid(element: ElementTree.Element) -> None:
    required, optional = ATTRIBUTES[element.tag]
    assert required <= element.attrib.keys() <= required | optional
    assert {child.tag for child in element} <= CHILDREN[element.tag]
    for child in element:
        assert_valid(child)


HOSTILE = 'a "<b>" & \x1b[31mred\x00\ufffe ]]>'


def results() -> list[GateResult]:
    gate, other = parse_gate("al=-1%"), parse_gate(f"al[{HOSTILE.replace(']', ')')}]=-3%")
    return [
        GateResult(gate, "K=3", "pass", Figure(0.1, (0.05, 0.15)), "all within"),
        GateResult(other, "K=3", "fail", Figure(-0.1, (-0.15, -0.05)), HOSTILE),
        GateResult(gate, "K=5", "inconclusive", Figure(None, why_not="no steps"), "no steps"),
        GateResult(gate, HOSTILE, "pass", Figure(0.1, (0.05, 0.15)), "all within"),
    ]


def test_junit_is_valid_and_tells_every_outcome() -> None:
    text = junit.render(results(), {"base": HOSTILE})
    root = ElementTree.fromstring(text)
    assert_valid(root)
    assert root.attrib["tests"] == "4"
    assert [suite.attrib["tests"] for suite in root] == ["2", "1", "1"]
    assert [suite.attrib["failures"] for suite in root] == ["1", "0", "0"]
    assert [suite.attrib["skipped"] for suite in root] == ["0", "1", "0"]
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None
    assert failure.attrib["message"] == ('-10.00 % (95 % -15.00 to -5.00): a "<b>" & red ]]>')
    skipped = root.find("testsuite/testcase/skipped")
    assert skipped is not None
    assert skipped.attrib["message"] == "n/a: no steps"


def test_junit_holds_the_numbers_at_full_precision() -> None:
    gate = parse_gate("al=-1%")
    figure = Figure(0.1 + 0.2, (1 / 3, 2 / 3))
    root = ElementTree.fromstring(
        junit.render([GateResult(gate, "K=3", "pass", figure, "")], {"base": "b"})
    )
    found = {p.attrib["name"]: p.attrib["value"] for p in root.iter("property")}
    assert found["base"] == "b"
    assert float(found["al -1 %: change"]) == 0.1 + 0.2
    assert float(found["al -1 %: low"]) == 1 / 3
    assert float(found["al -1 %: high"]) == 2 / 3
    assert found["al -1 %: outcome"] == "pass"


def test_gate_table_shows_gate_outcome_figure_interval_margin() -> None:
    blocks = list(of_gates(results()))
    verdict, table = blocks[1], blocks[2]
    assert isinstance(verdict, Paragraph)
    assert verdict.text == "FAILED: 1 of 4 lie beyond their margin."
    assert isinstance(table, Table)
    assert table.rows[0] == (
        "K=3", "al", "pass", "+10.00 % (95 % +5.00 to +15.00)", "-1 %", "all within",
    )  # fmt: skip
    assert [row[2] for row in table.rows] == ["pass", "fail", "inconclusive", "pass"]


def test_no_gates_no_section() -> None:
    assert list(of_gates([])) == []
