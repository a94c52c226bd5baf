"""What makes long runs cheap changes nothing: order of stored steps, what is kept, what is told."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speedbench import metrics, store
from speedbench.checks import all_checks, counted
from speedbench.insights.steps import steps_of
from speedbench.report.arms import load_arms
from speedbench.report.curves import _means
from speedbench.store import Run
from tests.builders import conversation, stored, turn

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "report_speed.py"
    spec = importlib.util.spec_from_file_location("report_speed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report_speed"] = module
    spec.loader.exec_module(module)
    return module


def some(directory: Path) -> Run:
    records = [
        conversation(f"c{i}", "xyz"[i % 3], [1, 4, 2, 1 + i % 4], [1, 3, 3], finish="length")
        for i in range(9)
    ]
    return stored(directory, records)


# --- loading --------------------------------------------------------------------------------------


def test_steps_in_any_order_are_the_same_columns(tmp_path: Path) -> None:
    run = some(tmp_path / "run")
    path = run.directory / "steps" / "00000.parquet"
    table = pq.read_table(path)
    mixed = np.random.default_rng(3).permutation(table.num_rows)
    pq.write_table(table.take(pa.array(mixed)), path)
    again = store.load(run.directory)
    assert again.damage == run.damage == ()
    for field in fields(run.columns):
        one, other = getattr(run.columns, field.name), getattr(again.columns, field.name)
        assert np.array_equal(one, other), field.name
    assert run.columns.request.tolist() == sorted(run.columns.request.tolist())


def test_steps_of_no_turn_are_left_out(tmp_path: Path) -> None:
    run = some(tmp_path / "run")
    path = run.directory / "steps" / "00000.parquet"
    table = pq.read_table(path)
    names = table["request_id"].to_pylist()
    n_of_first = names.count(names[0])
    strange = pa.array(["nobody"] * n_of_first + names[n_of_first:])
    pq.write_table(table.set_column(0, table.schema.field(0), strange), path)
    again = store.load(run.directory)
    assert len(again.columns.step) == len(run.columns.step) - n_of_first
    assert 0 not in again.columns.request


def test_sums_of_stored_counts_are_wider_than_they(tmp_path: Path) -> None:
    """Two answers of 2^20 - 1 tokens in events as large as a part may hold, times 2100: 2^31."""
    wide = (1 << 20) - 1
    lengths = [1, *[wide] * 2100]
    record = conversation(
        "a", "x", turn("a.0", [1, 2], finish="length"), turn("a.1", [1, 2], number=1)
    )
    run = stored(tmp_path / "run", [record])
    columns = replace(
        run.columns,
        request=np.zeros(len(lengths), np.int32),
        step=np.arange(len(lengths), dtype=np.int32),
        time_ns=np.arange(len(lengths), dtype=np.int64),
        engine_steps=np.array([1, *[wide] * 2100], np.int32),
        n_tokens=np.array(lengths, np.int32),
        accepted=np.full(len(lengths), -1, np.int32),
        drafted=np.full(len(lengths), -1, np.int32),
    )
    total = 1 + 2100 * wide
    assert total > 2**31
    assert metrics.timing(columns, 3).n_output_tokens.tolist() == [total]
    window = metrics.whole_window(columns, 0, [metrics.Span(0, 0, 10**9)])
    assert window.n_tokens == total
    found = metrics.acceptance(columns, 3)
    assert found.n_merged == 2100


def test_what_was_computed_belongs_to_its_run_alone(tmp_path: Path) -> None:
    run = some(tmp_path / "run")
    assert counted(run) is counted(run)
    assert all_checks(run) is all_checks(run)
    engine = {**run.manifest["engine"], "simulated": True}
    other = replace(run, manifest={**run.manifest, "engine": engine})
    assert "SIMULATED" in all_checks(other)[0].sentence
    assert not any("SIMULATED" in check.sentence for check in all_checks(run))


# --- counting -------------------------------------------------------------------------------------


def test_steps_by_group_and_length_counted_by_hand() -> None:
    random = np.random.default_rng(5)
    group, length = random.integers(0, 4, 500), random.integers(1, 5, 500)
    censored = random.random(500) < 0.3
    whole, cut = metrics.count_lengths(group, length, censored, 4, 3)
    by_hand = Counter(zip(group.tolist(), length.tolist(), censored.tolist(), strict=True))
    for g in range(4):
        for n in range(5):
            assert (whole[g, n], cut[g, n]) == (by_hand[g, n, False], by_hand[g, n, True])


def test_a_level_over_time_by_hand() -> None:
    """3 from 10, 5 from 20, 0 from 40 on; before, nothing."""
    at, change = np.array([20, 10, 40]), np.array([2, 3, -5], np.int32)
    found = _means(at, change, np.array([0.0, 20.0, 30.0, 60.0]))
    assert found == pytest.approx((1.5, 5.0, 5 * 10 / 30))


def test_where_each_decode_step_lies_in_its_answer(tmp_path: Path) -> None:
    some(tmp_path / "run")
    (arm,) = load_arms([tmp_path / "run"])
    steps = steps_of(arm)
    turns = [[1, 4, 2, 1 + i % 4] if t == 0 else [1, 3, 3] for i in range(9) for t in range(2)]
    position, first, begun = [], [], 0
    for lengths in turns:
        position += [sum(lengths[:n]) for n in range(1, len(lengths))]
        first += [begun + sum(lengths[:n]) for n in range(1, len(lengths))]
        begun += sum(lengths)
    assert (steps.position.tolist(), steps.first_token.tolist()) == (position, first)
    assert steps.conversation.tolist() == [i for i in range(9) for _ in range(5)]


# --- the script -----------------------------------------------------------------------------------


def test_twelve_arms_are_twelve(script: ModuleType, tmp_path: Path) -> None:
    arms = tuple((k, c) for c in (2, 4) for k in script.DRAFT_LENGTHS)
    plan = script.scale_plan(6000, arms, 1, 24, n_parts=3)
    script.make_all(tmp_path / "runs", plan)
    found = load_arms([tmp_path / "runs"])
    assert len(found) == 12
    runs = [run for arm in found for run in arm.runs]
    n_steps = sum(len(run.columns.step) for run in runs)
    assert n_steps == pytest.approx(6000, rel=0.05)
    for run in runs:
        assert not [check for check in all_checks(run) if check.level == "error"]
        assert run.damage == ()
