"""The matrix of models by categories: hand-computed cells, AIPerf's layout, no cell made up."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from speedbench import store
from speedbench.report import layout_matrix
from speedbench.report.arms import grouped
from speedbench.report.blocks import Heading, Table
from speedbench.report.matrix import METRICS, Matrix, Metric, acceptance_rates, matrix
from speedbench.store import Run
from speedbench.types import UNKNOWN, ConversationRecord
from tests.builders import S, conversation, session, stored, told, turn


def drafted(name: str, category: str, pairs: Sequence[tuple[int, int]]) -> ConversationRecord:
    """A request of a prefill and of steps that accepted and drafted so many."""
    lengths = [1, *(accepted + 1 for accepted, _ in pairs)]
    return conversation(name, category, turn(name, lengths, told=[(0, 0), *pairs]))


def of(run: Run, metric: Metric) -> Matrix:
    return matrix(grouped([run]), metric)


def table(found: Matrix) -> Table:
    heading, block = layout_matrix.of_matrix(found)
    assert isinstance(heading, Heading)
    assert isinstance(block, Table)
    return block


def cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_cells_by_hand(tmp_path: Path) -> None:
    """coding accepted 3 + 1 + 0 of 9, and 2 of 2: 6 / 11; math 0 + 3 of 6. Mean of both.

    Lengths: coding 4, 2, 1, 3; math 1, 4: 2.5 and 2.5.
    """
    records = [
        drafted("a", "coding", [(3, 3), (1, 3), (0, 3)]),
        drafted("b", "coding", [(2, 2)]),
        drafted("c", "math", [(0, 3), (3, 3)]),
    ]
    run = stored(tmp_path / "r", records, config={"model_dir": "/models/Llama-70B/"})
    (rates,) = of(run, "accept_rate").rows
    assert rates.cells["coding"].value == pytest.approx(6 / 11)
    assert rates.cells["math"].value == pytest.approx(1 / 2)
    assert rates.overall.value == pytest.approx((6 / 11 + 1 / 2) / 2)
    (lengths,) = of(run, "accept_length").rows
    assert lengths.cells["coding"].value == pytest.approx(10 / 4)
    assert lengths.overall.value == pytest.approx((10 / 4 + 5 / 2) / 2)
    assert rates.model == lengths.model == "Llama-70B"


def test_csv_has_the_shape_that_aiperf_writes(tmp_path: Path) -> None:
    """Header Model, categories in its order, Overall; one line for each model; empty where none."""
    one = stored(
        tmp_path / "a",
        [drafted(f"a{i}", c, [(1, 3), (2, 3)]) for i, c in enumerate(["writing", "coding"])],
        config={"model_dir": "/m/one"},
    )
    two = stored(
        tmp_path / "b",
        [drafted("b", "math", [(3, 3)])],
        expected={"math": 1, "qa": 1},
        config={"model_dir": "/m/two"},
    )
    text = layout_matrix.to_csv(matrix(grouped([one, two]), "accept_rate"))
    assert cells(text) == [
        ["Model", "coding", "math", "qa", "writing", "Overall"],
        ["one", "0.5000", "", "", "0.5000", "0.5000"],
        ["two", "", "1.0000", "", "", ""],
    ]
    assert [row[1:] for row in table(matrix(grouped([one, two]), "accept_rate")).rows][-1] == (
        "-", "1.0000", "n/a", "-", "n/a",
    )  # fmt: skip


def test_tiers_of_a_throughput_configuration_go_from_low_to_high(tmp_path: Path) -> None:
    names = ["high_entropy", "low_entropy", "mixed"]
    run = stored(tmp_path / "r", [drafted(n, n, [(1, 3)]) for n in names])
    assert of(run, "accept_rate").categories == ("low_entropy", "mixed", "high_entropy")


def test_a_rate_is_not_made_up_where_the_engine_does_not_tell(tmp_path: Path) -> None:
    """Every step of the first category is told; in the second one step is not; the third's request
    ended within a step of which the engine tells the draft but not what it accepted."""
    cut = turn("c", [1, 4, 2], told=[(0, 0), (UNKNOWN, 3), (UNKNOWN, 3)], finish="length")
    records = [
        drafted("a", "told", [(1, 3), (2, 3)]),
        conversation("b", "untold", turn("b", [1, 2, 2], told=[(0, 0), (1, 3), (UNKNOWN, -1)])),
        conversation("c", "cut", cut),
        conversation("d", "full", turn("d", [1, 4, 4], told=[(0, 0), (UNKNOWN, 3), (UNKNOWN, 3)])),
    ]
    (row,) = of(stored(tmp_path / "r", records), "accept_rate").rows
    assert row.cells["told"].value == pytest.approx(3 / 6)
    assert row.cells["full"].value == pytest.approx(1)  # nothing can have been cut from a full step
    for name in ("untold", "cut"):
        assert row.cells[name].value is None
        assert "does not tell in 1 of 1 conversations" in row.cells[name].why_not
    assert row.overall.value is None
    assert row.overall.why_not.startswith("category cut: the engine does not tell")


def test_plain_steps_and_failed_conversations_are_in_no_rate(tmp_path: Path) -> None:
    plain = turn("a", [1, 1, 3, 1], told=[(0, 0), (0, 0), (2, 4), (0, 0)])
    bad = turn("b", [1, 4], told=[(0, 0), (3, 3)], finish="error", error="boom")
    records = [conversation("a", "qa", plain), conversation("b", "qa", bad)]
    (row,) = of(stored(tmp_path / "r", records, draft_length=4), "accept_rate").rows
    assert row.cells["qa"].value == pytest.approx(2 / 4)


def test_a_baseline_has_a_length_of_1_and_no_rate(tmp_path: Path) -> None:
    records = [
        conversation(str(i), "qa", turn(str(i), [1, 1, 1], told=[(0, 0)] * 3)) for i in range(2)
    ]
    run = stored(tmp_path / "r", records, draft_length=0)
    (row,) = of(run, "accept_rate").rows
    assert row.overall.value is None
    assert row.overall.why_not.startswith("nothing was drafted")
    (row,) = of(run, "accept_length").rows
    assert row.overall.value == 1


def test_throughput_is_of_the_run_and_of_a_category_only_if_it_is_alone(tmp_path: Path) -> None:
    """Three requests of 3 tokens in a session of 2 s: 4.5 tokens/s."""
    times = [10**8, 2 * 10**8, 2 * S]
    records = [
        conversation(str(i), "a" if i else "b", turn(str(i), [1, 1, 1], times_ns=times))
        for i in range(3)
    ]
    about = [session(ended_ns=2 * S)]
    (row,) = of(stored(tmp_path / "two", records, sessions=about), "throughput").rows
    assert row.overall.value == pytest.approx(9 / 2)
    assert [figure.value for figure in row.cells.values()] == [None, None]
    assert "served together" in row.cells["a"].why_not
    alone = [conversation(c.conversation_id, "a", *c.turns) for c in records]
    (row,) = of(stored(tmp_path / "one", alone, sessions=about), "throughput").rows
    assert row.cells["a"].value == pytest.approx(9 / 2)
    assert row.overall.value == pytest.approx(9 / 2)


def test_runs_of_one_target_are_told_apart_and_repeats_are_numbered(tmp_path: Path) -> None:
    def run(name: str, concurrency: int) -> Run:
        return stored(
            tmp_path / name,
            [drafted("a", "qa", [(1, 3)])],
            config={"concurrency": concurrency, "model_dir": "/m/target"},
        )

    found = matrix(grouped([run("a", 1), run("b", 8), run("c", 8)]), "accept_rate")
    assert [row.model for row in found.rows] == [
        "target, EAGLE3 K=3, concurrency 1",
        "target, EAGLE3 K=3, concurrency 8 (repeat 1 of 2)",
        "target, EAGLE3 K=3, concurrency 8 (repeat 2 of 2)",
    ]


def test_intervals_stand_below_the_values_and_reasons_in_the_notes(tmp_path: Path) -> None:
    draw = random.Random(3)
    records = [
        drafted(f"{c}{i}", c, [(draw.randrange(4), 3) for _ in range(20)])
        for c in ("coding", "math")
        for i in range(12)
    ]
    records.append(drafted("lone", "qa", [(1, 3)]))
    run = stored(tmp_path / "r", records)
    shown = table(of(run, "accept_rate"))
    (row,) = of(run, "accept_rate").rows
    value, low, high = (dict(zip(("m", "c", "ma", "qa", "o"), r, strict=True)) for r in shown.rows)
    interval = row.cells["coding"].interval
    assert interval is not None
    assert (value["c"], low["c"], high["c"]) == tuple(
        f"{x:.4f}" for x in (row.cells["coding"].value, *interval)
    )
    assert (low["m"], low["qa"], low["o"]) == ("95 % from", "", "")
    assert any("no interval: a single conversation has none" in note for note in shown.notes)
    assert (row.overall.interval, row.overall.why_not) == (
        None, "category qa: a single conversation has none",
    )  # fmt: skip


def test_rate_intervals_cover_the_truth(tmp_path: Path) -> None:
    """400 runs of 24 conversations, each with a rate of its own around 0.6: the interval of the
    category holds 0.6 in about 95 % of them (0.92 to 0.98 is 2.75 standard errors off)."""
    generator = np.random.default_rng(11)
    n_runs, n, k, steps = 400, 24, 4, 30
    hits = 0
    base = stored(
        tmp_path / "r",
        [drafted(str(i), "qa", [(0, k)] * steps) for i in range(n)],
        draft_length=k,
    )
    for _ in range(n_runs):
        rate = generator.beta(12, 8, n).repeat(steps)  # mean 0.6
        accepted = np.zeros(len(base.columns.step), np.int64)
        accepted[base.columns.step > 0] = generator.binomial(k, rate)
        columns = _with(base, accepted)
        low, high = acceptance_rates(columns)[0]["qa"].interval or (0.0, 0.0)
        hits += low <= 0.6 <= high
    assert 0.92 <= hits / n_runs <= 0.98


def _with(run: Run, accepted: np.ndarray) -> Run:  # type: ignore[type-arg]
    from dataclasses import replace

    columns = replace(run.columns, accepted=accepted, n_tokens=accepted + 1)
    return replace(run, columns=columns)


@pytest.mark.parametrize("metric", METRICS)
def test_a_run_without_records_has_reasons_and_no_number(tmp_path: Path, metric: Metric) -> None:
    run = stored(tmp_path / "r", [], expected={"a": 2}, sessions=[])
    found = of(run, metric)
    (row,) = found.rows
    assert row.cells["a"].value is None
    assert row.cells["a"].why_not
    assert row.overall.value is None
    assert row.overall.why_not
    assert table(found).rows[0][1:] == ("n/a", "n/a")
    assert cells(layout_matrix.to_csv(found))[1][1:] == ["", ""]


def test_a_twin_over_random_runs(tmp_path: Path) -> None:
    """Accepted over drafted tokens, summed from the parts as they lie on disk."""
    import pyarrow.parquet as pq

    draw = random.Random(8)
    records = [
        drafted(str(i), draw.choice("xyz"), [(draw.randrange(d + 1), d) for d in (1, 2, 3, 0, 3)])
        for i in range(40)
    ]
    run = stored(tmp_path / "r", records)
    turns = pq.read_table(tmp_path / "r" / "turns" / "00000.parquet").to_pylist()
    category = {row["request_id"]: row["category"] for row in turns}
    sums = {c: [0, 0] for c in "xyz"}
    for row in pq.read_table(tmp_path / "r" / "steps" / "00000.parquet").to_pylist():
        if row["step"] and row["drafted"] > 0:
            sums[category[row["request_id"]]][0] += row["accepted"]
            sums[category[row["request_id"]]][1] += row["drafted"]
    (row,) = of(store.load(run.directory), "accept_rate").rows
    for name, (accepted, proposed) in sums.items():
        assert row.cells[name].value == pytest.approx(float(Fraction(accepted, proposed)))


def test_told_helper_agrees(tmp_path: Path) -> None:
    """An engine that tells when a request ends what its cut last step had accepted."""
    lengths = [1, 4, 2]
    record = conversation("a", "qa", turn("a", lengths, told=told(lengths, 3, last=3)))
    (row,) = of(stored(tmp_path / "r", [record]), "accept_rate").rows
    assert row.cells["qa"].value == pytest.approx(6 / 6)
