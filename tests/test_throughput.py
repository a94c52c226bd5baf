"""scripts/throughput.py: its ratios, its rounds and its page, from made-up visits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts import throughput
from scripts.throughput import OURS, OWN, ROUND, SAME, Cell, Held, Plan, Round, Section, Visit
from speedbench.config import from_dict

DIGESTS = ("a", "b", "c", "d")
TPS = {"own": 100.0, "ours": 90.0, "same": 96.0}


def visit(tps: float, digests: Sequence[str] = DIGESTS, **told: float | None) -> Visit:
    return Visit(1000 / tps, 1000, tuple(digests), **told)  # type: ignore[arg-type]


def drifting(per_visit: float) -> Round:
    """A round on a machine that gets faster by this factor from visit to visit."""
    visits: dict[str, list[Visit]] = {}
    for i, leg in enumerate(ROUND):
        visits.setdefault(leg.name, []).append(
            visit(TPS[leg.name] * per_visit**i, n_steps=50 + i if leg == OURS else None)
        )
    return Round(visits)


def cell(*drifts: float, algorithm: str = "NONE") -> Cell:
    return Cell(algorithm, 2, visit(95, n_steps=48, al=2.5), [drifting(d) for d in drifts])


# ---------------------------------------------------------------- arithmetic


def test_a_steady_drift_of_the_machine_changes_no_ratio() -> None:
    for drift in (0.8, 1.0, 1.3):
        found = drifting(drift)
        assert math.exp(found.log_ratio(OURS, OWN)) == pytest.approx(0.9)
        assert math.exp(found.log_ratio(OURS, SAME)) == pytest.approx(0.9375)


def test_every_leg_has_the_same_middle_of_a_round() -> None:
    for leg in (OWN, OURS, SAME):
        places = [i for i, one in enumerate(ROUND) if one == leg]
        assert sum(places) / len(places) == (len(ROUND) - 1) / 2
    assert [leg.closed_loop for leg in (OWN, OURS, SAME)] == [False, True, False]


@pytest.mark.parametrize(
    ("logs", "half"),
    [  # Student's t at 97.5 %, from a printed table, times the standard error
        ((0.01, -0.01), 12.706 * 0.01),
        ((0.03, -0.01, -0.02), 4.303 * math.sqrt(0.0014 / 2 / 3)),
        ((0.01, 0.01, -0.01, -0.01), 3.182 * math.sqrt(0.0004 / 3 / 4)),
    ],
)
def test_a_ratio_has_students_interval_on_the_logarithm(logs: Sequence[float], half: float) -> None:
    shifted = [x + math.log(0.97) for x in logs]
    found = throughput.ratio_of(shifted)
    assert found.value == pytest.approx(0.97)
    assert found.interval is not None
    assert found.interval[0] == pytest.approx(0.97 * math.exp(-half), rel=1e-4)
    assert found.interval[1] == pytest.approx(0.97 * math.exp(half), rel=1e-4)


def test_one_round_has_no_interval_and_no_verdict() -> None:
    found = throughput.ratio_of([0.0])
    assert (found.value, found.interval) == (1.0, None)
    assert throughput.verdict(found) == "one round tells nothing"


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        ((0.98, 1.01), "met"),
        ((0.979, 1.01), "cannot be told"),
        ((0.90, 0.98), "cannot be told"),
        ((0.90, 0.979), "not met"),
    ],
)
def test_the_target_is_met_where_the_whole_interval_is_above_it(
    interval: tuple[float, float], told: str
) -> None:
    assert throughput.verdict(throughput.Ratio(0.95, interval)) == told


def test_throughputs_of_rounds_are_averaged_as_ratios_are() -> None:
    """Geometrically: the table's own, ours and ratio fit each other."""
    found = cell(0.9, 1.0, 1.2)
    ratio = found.ratio(OURS, OWN)
    assert found.mean_tps(OURS) / found.mean_tps(OWN) == pytest.approx(ratio.value)
    assert found.mean_steps() == pytest.approx(52.5)  # of the two visits in the middle


def test_outputs_that_differ_are_counted_over_all_visits() -> None:
    same = drifting(1.0)
    wrong = visit(90, ("a", "b", "x", "y"))
    visits = {**same.visits, "ours": [same.visits["ours"][0], wrong]}
    found = Cell("NONE", 2, visit(95), [same, Round(visits)])
    assert (found.n_differing(), found.n_outputs()) == (2, 2 * 6 * 4)


# ---------------------------------------------------------------- the page


def test_the_section_shows_ratios_steps_and_whether_outputs_agree() -> None:
    text = Section("VLLM", ["About it."], [cell(1.0, 1.0, algorithm="DRAFT_TARGET")]).text()
    row = next(line for line in text.splitlines() if line.startswith("| DRAFT_TARGET"))
    assert [word.strip() for word in row.strip("|").split("|")] == [
        "DRAFT_TARGET", "2", "4", "2.50", "100", "96", "90", "0.938 [0.938, 0.938]", "not met",
        "0.900 [0.900, 0.900]", "not met", "52", "48",
    ]  # fmt: skip
    head = next(line for line in text.splitlines() if line.startswith("| arm"))
    assert head.count("|") == row.count("|")
    assert "All 48 outputs" in text

    wrong = Round({**drifting(1.0).visits, "same": [visit(80, ("a", "b", "c", "x"))]})
    text = Section("VLLM", [], [Cell("NONE", 2, visit(95), [drifting(1.0), wrong])]).text()
    assert "**1 of 44 outputs differ" in text


def test_the_page_keeps_the_other_engines_section() -> None:
    vllm, sglang = (Section(name, [f"About {name}."], [cell(1.0)]) for name in ("VLLM", "SGLANG"))
    once = throughput.page("", vllm, "# Title\n\nWords.\n")
    both = throughput.page(once, sglang, "# Title\n\nOther words.\n")
    assert both.count("\n## ") == 2
    assert both.count("# Title") == 1
    assert "Other words." in both
    assert "\nWords." not in both
    assert both.index("About VLLM.") < both.index("About SGLANG.")
    again = throughput.page(both, Section("VLLM", ["Anew."], [cell(1.0)]), "# Title\n")
    assert "About VLLM." not in again
    assert again.count("About SGLANG.") == again.count("Anew.") == 1
    assert throughput.page(again, Section("VLLM", ["Anew."], [cell(1.0)]), "# Title\n") == again


# ---------------------------------------------------------------- how it is measured


def test_the_arms_differ_in_speculation_alone(tmp_path: Path) -> None:
    for engine in ("VLLM", "SGLANG"):
        plan = Plan(engine, sys.executable, tmp_path, tmp_path, [4], 3, 2, 16)
        none, draft = (from_dict(plan.config(name, 4)) for name in ("NONE", "DRAFT_TARGET"))
        assert draft.baseline() == none
        assert (draft.num_requests, draft.concurrency, draft.max_num_seqs) == (12, 4, 4)
        assert (draft.ignore_eos, draft.output_length, draft.temperature) == (True, 16, 0)


ECHO = """
import json, sys
for line in sys.stdin:
    leg, n = line.split()
    told = {"wall_s": 2.0, "n_tokens": int(n), "digests": [leg], "n_steps": None, "al": None}
    print(json.dumps(told), flush=True)
"""


@contextmanager
def echoing(program: str, log: Path) -> Iterator[Held]:
    with log.open("w") as handle:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=handle, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        yield Held("echo", process, log)
    finally:
        process.kill()
        process.communicate()


def test_who_does_not_measure_stands_still(tmp_path: Path) -> None:
    with echoing(ECHO, tmp_path / "log.txt") as held:
        for n in (7, 8):
            assert held.ask(SAME, n) == Visit(2.0, n, ("same",), None, None)
        _, status = os.waitpid(held.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


def test_a_process_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        echoing("raise SystemExit('no memory left')", tmp_path / "log.txt") as held,
        pytest.raises(SystemExit, match=r"(?s)no memory left.*'echo' ended"),
    ):
        held.read()
