"""The public API, and the example notebook, executed."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import speedbench
from speedbench.types import UNKNOWN, UserError
from tests.builders import MS, conversation, session, stored, turn, write_part

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "explore_a_run.ipynb"


def directory(path: Path) -> Path:
    """Two categories; one conversation failed and was asked again by a second session."""
    told = [(0, 0), (3, 3), (1, 3)]
    bad = turn("s0-c.0", [1, 2], finish="error", error="boom")
    records = [
        conversation("a", "qa", turn("a.0", [1, 4, 2], told=told)),
        conversation("b", "math", turn("b.0", [1, 3]), turn("b.1", [1, 1], number=1)),
        conversation("c", "qa", bad),
    ]
    stored(path, records, sessions=[session(0), session(1)])
    again = turn("s1-c.0", [1, 4, 4, 1])
    write_part(path, [conversation("c", "qa", again)], number=1)
    return path


def test_turns_and_steps_are_those_on_disk_the_last_attempt_alone(tmp_path: Path) -> None:
    run = speedbench.load(directory(tmp_path / "r"))
    assert run.turns["conversation_id"].to_pylist().count("c") == 1
    assert run.turns.num_rows == 4
    raw = pa.concat_tables(
        pq.read_table(path) for path in sorted((tmp_path / "r" / "steps").glob("*.parquet"))
    ).to_pylist()
    expected = {
        (row["request_id"], row["step"]): row
        for row in raw
        if (row["request_id"], row["session"]) != ("s0-c.0", 0)
    }
    found = {(row["request_id"], row["step"]): row for row in run.steps.to_pylist()}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        stored_row = expected[key]
        for name in ("turn", "session", "replica", "time_ns", "engine_steps", "n_tokens"):
            assert row[name] == stored_row[name]
        for name in ("accepted", "drafted"):
            known = None if stored_row[name] == UNKNOWN else stored_row[name]
            assert row[name] == known
    categories = {row["conversation_id"]: row["category"] for row in run.steps.to_pylist()}
    assert categories == {"a": "qa", "b": "math", "c": "qa"}
    sums = {row["request_id"]: 0 for row in run.turns.to_pylist()}
    for row in run.steps.to_pylist():
        sums[row["request_id"]] += row["n_tokens"]
    assert sums == {
        row["request_id"]: len(row["output_token_ids"]) for row in run.turns.to_pylist()
    }


def test_numbers_have_their_interval_or_the_reason(tmp_path: Path) -> None:
    records = [
        conversation(f"{c}{i}", c, turn(f"{c}{i}", [1, 1 + i % 4, 4, 2], step_ns=10 * MS))
        for c in ("math", "qa")
        for i in range(8)
    ]
    run = speedbench.load(stored(tmp_path / "r", records).directory)
    al = run.metrics["al"]
    assert al == run.summary.lengths["al"]
    assert al.value is not None
    assert al.interval is not None
    assert al.interval[0] < al.value < al.interval[1]
    assert run.metrics["n_steps"].value == 64
    assert run.metrics["published_histogram_1"].value == 16 + 4  # prefills, and i % 4 == 0
    gpu = run.metrics["output_tps_per_gpu"]
    assert gpu.value is not None or gpu.why_not
    assert run.metrics["draft_hit_rate"].why_not == "the engine does not tell verify from plain"


def test_the_category_table_by_hand(tmp_path: Path) -> None:
    """math: 2 of 3 expected; steps of 3 and 1 tokens (cut at 1 of 4), 3 and 4: user TPS of
    4 tokens in 20 ms and 7 in 20 ms."""
    records = [
        conversation("a", "math", turn("a", [1, 3, 1], step_ns=10 * MS)),
        conversation("b", "math", turn("b", [1, 3, 4], step_ns=10 * MS)),
    ]
    run = speedbench.load(stored(tmp_path / "r", records, expected={"math": 3, "qa": 1}).directory)
    math, qa = run.category_table().to_pylist()
    assert (math["category"], math["n_complete"], math["n_expected"]) == ("math", 2, 3)
    assert math["n_decode_steps"] == 4
    # Position 1: 3 of 3 known survive (the cut step is known to hold 1 only); 2: 3 of 3; 3: 1 of 3.
    assert math["al"] == pytest.approx(1 + 1 + 1 + 1 / 3)
    assert math["user_tps_median"] == pytest.approx(float(Fraction(200 + 350, 2)))
    assert (qa["n_complete"], qa["al"], qa["user_tps_median"]) == (0, None, None)
    assert qa["al_why_not"] == "no conversation was measured"


def test_compare_pairs_conversations(tmp_path: Path) -> None:
    """20 tokens after the first in 20 steps of 10 ms, or in 8 steps of 15 ms: 200/120."""
    runs = []
    for name, k, lengths, step_ms in (
        ("base", 0, [1] * 21, 10),
        ("spec", 3, [1, 1, 2, 3, 4, 1, 2, 3, 4], 15),
    ):
        told = [(0, 0), *((n - 1, k) for n in lengths[1:])]
        records = [
            conversation(
                str(i), "qa", turn(str(i), lengths, step_ns=step_ms * MS, told=told)
            )
            for i in range(4)
        ]  # fmt: skip
        run = stored(tmp_path / name, records, draft_length=k)
        runs.append(speedbench.load(run.directory))
    found = speedbench.compare(*runs)
    assert found.arms[0].overall.user_tps.value == pytest.approx(5 / 3)
    assert found.base.is_baseline
    with pytest.raises(UserError, match="at least one run"):
        speedbench.compare(runs[0])
    with pytest.raises(UserError, match="repeats of one arm"):
        speedbench.compare(runs[0], speedbench.load(runs[0].directory))


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        speedbench.load(tmp_path)


def test_names_are_found_and_others_are_not() -> None:
    assert set(speedbench.__all__) <= set(dir(speedbench)) | {"LoadedRun", "compare", "load"}
    for name in speedbench.__all__:
        assert getattr(speedbench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = speedbench.nothing


def test_import_and_load_need_numpy_and_pyarrow_alone(tmp_path: Path) -> None:
    place = directory(tmp_path / "r")
    heavy = ("scipy", "pydantic", "rich", "torch", "transformers", "pandas", "engines", "jinja2")
    code = (
        "import sys, speedbench\n"
        "light = [m for m in ('numpy', 'pyarrow') if m in sys.modules]\n"
        f"run = speedbench.load({str(place)!r})\n"
        "run.turns, run.steps, run.manifest, repr(run)\n"
        f"print(light, [m for m in {heavy!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[] []"


# --- the notebook ---------------------------------------------------------------------------------


def test_the_notebook_runs_and_agrees_with_the_report(tmp_path: Path) -> None:
    """Its code cells in one fresh interpreter, in order, in an empty folder."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    done = subprocess.run(
        [sys.executable, "-"], input=program, capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("<speedbench run ")
    positions = [line.split() for line in lines if line.startswith("position ")]
    assert len(positions) == 3
    for _, _, counted, _, reported in positions:
        assert float(counted) == pytest.approx(float(reported), abs=0.06)
    (speedup,) = (line for line in lines if line.startswith("speedup "))
    assert float(speedup.split()[1].rstrip(",")) > 1.5  # AL is about 2.5, and a step costs the same


def test_the_notebook_is_whole() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert max(map(len, "".join(cell["source"]).splitlines())) <= 100


def test_a_listing_shows_what_can_be_called() -> None:
    """Names that are imported when they are asked for are listed all the same."""
    code = "import speedbench, sys; print(*dir(speedbench)); print('pyarrow' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"LoadedRun", "compare", "load", "__version__"} <= set(out)
    assert out[-1] == "False"
